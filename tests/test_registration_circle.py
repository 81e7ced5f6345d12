"""A model class of transformers as the first import: it stands in a circle with the Auto classes."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import genoembed
from transformers import BertModel
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM._model_mapping[genoembed.StripedHyena2Config].__name__, BertModel.__name__)
"""


def test_model_class_may_be_imported_first():
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "StripedHyena2ForCausalLM BertModel\n"
