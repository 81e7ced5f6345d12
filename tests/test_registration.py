"""transformers knows our classes, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
import genoembed
config = AutoConfig.for_model("striped_hyena2")
assert type(config) is genoembed.StripedHyena2Config, config
for auto_class in (AutoModel, AutoModelForCausalLM):
    assert "StripedHyena2" in auto_class._model_mapping[type(config)].__name__
print("known")
"""
FIRST = (
    "import transformers",
    "from transformers import AutoConfig",
    "from transformers import AutoTokenizer",
    "from transformers import AutoModelForCausalLM",
    "from transformers import LlamaForCausalLM",
    "from transformers import BertModel",
    "from transformers import Trainer",
    "import transformers.modeling_layers",
    "from genoembed import load_model",
    "from genoembed import CharTokenizer",
)


@pytest.mark.parametrize("order", ["genoembed first", "genoembed last"])
@pytest.mark.parametrize("statement", FIRST)
def test_auto_classes_know_ours_whatever_is_imported_first(statement, order):
    lines = ["import genoembed", statement]
    code = "\n".join(lines if order == "genoembed first" else lines[::-1]) + KNOWN
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "known\n"
