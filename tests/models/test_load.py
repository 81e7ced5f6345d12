"""Loading: what is refused, what is forgiven, and what the loaded model says about itself."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from genoembed.errors import CheckpointError, ConfigError, LayerError, ModelError, ModelNotFoundError
from genoembed.models import precision
from genoembed.models.describe import describe_layers
from genoembed.models.load import load_model
from genoembed.models.pretrained import check_reads_dna
from tests.models.conftest import make_batch
from tests.tiny_models import build_config, build_striped_hyena, build_tiny

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def copy_with(folder: Path, target: Path, change) -> str:
    """Copy a model folder and change its tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def with_tokenizer(module, folder: Path, tokenizer_from: Path) -> str:
    """Save a model and give it a tokenizer."""
    module.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_from / name, folder / name)
    return str(folder)


def reader_of(*tokens):
    vocabulary = {token: index for index, token in enumerate(("<unk>", "<pad>", *tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ((*"ACGTN", "<dna>", "</dna>"), "reads DNA between <dna> and </dna> only, and bases without them as"),
        (
            (*"ACDEFGHIKLMNPQRSTVWYXacgt", "<+>", "<->"),
            "DNA in lower case, and letters in upper case as prot",
        ),
    ],
)
def test_tokenizer_that_takes_bases_for_something_else_is_refused(tokens, problem, tmp_path):
    folder = build_tiny("llama", tmp_path / "tiny")
    reader_of(*tokens).save_pretrained(folder)
    with pytest.raises(ModelError, match=rf"{problem}.*choose a model that reads plain DNA in upper case"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "tokens",
    [
        "ACGTNacgtn",
        (*"ACDEFGHIKLMNPQRSTVWY", "<cls>"),
        map(chr, range(33, 127)),
        (*"ACGT", "<rna>", "</rna>", "<dna>"),
    ],
)
def test_tokenizers_that_read_bases_are_not_refused(tokens):
    check_reads_dna(reader_of(*tokens), "x")


def test_model_is_in_eval_mode_and_says_what_it_is(tiny_model):
    model = tiny_model("bert")
    assert not model.module.training
    facts = model.provenance
    assert facts["class"] == "BertModel"
    assert (facts["dtype"], facts["device"], facts["padding"]) == ("float32", "cpu", "mask")
    assert len(facts["weights_sha256"]) == 64
    assert facts["num_parameters"] == model.module.num_parameters()
    assert (facts["revision"], facts["license"]) == (None, "unknown")


def test_loading_draws_nothing(tiny_folder, capfd):
    folder = str(tiny_folder("llama"))
    capfd.readouterr()  # writing the folder draws, where no test did it before
    load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_remote_code_needs_trust(tiny_folder):
    with pytest.raises(ModelError, match=r"its own Python code, .* then set trust_remote_code=True"):
        load_model(str(tiny_folder("custom_conv")), device="cpu")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_is_as_asked(dtype, expected, tiny_folder):
    model = load_model(str(tiny_folder("llama")), device="cpu", dtype=dtype)
    assert model.dtype == expected
    captured = model.forward(make_batch([5, 6, 7]), ["layers.0"])["layers.0"]
    assert captured.dtype == expected


@pytest.mark.parametrize("dtype", [None, "auto"])
@pytest.mark.parametrize(("is_faster", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype_is_the_faster_one_where_none_is_asked(dtype, is_faster, expected, tiny_folder, monkeypatch):
    monkeypatch.setitem(precision._decided, "cpu", is_faster)
    assert load_model(str(tiny_folder("llama")), device="cpu", dtype=dtype).dtype == expected


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is mapped")
def test_weights_of_the_type_that_is_stored_stay_in_the_file(tiny_folder):
    """Memory-mapped: no copy of the checkpoint in memory, and several processes share one."""
    path = tiny_folder("llama") / "model.safetensors"
    model = load_model(str(path.parent), device="cpu", dtype="float32")
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    weights = dict(model.module.named_parameters())
    copied = [
        name
        for name, weight in weights.items()
        if not any(start <= weight.data_ptr() < end for start, end in spans)
    ]
    assert len(weights) > 10
    assert copied == []


def test_unknown_dtype_is_refused(tiny_folder):
    with pytest.raises(ModelError, match="dtype 'float8' is not known, expected auto, float32"):
        load_model(str(tiny_folder("llama")), device="cpu", dtype="float8")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_device_that_is_not_there_is_refused(device, tiny_folder):
    with pytest.raises(
        ModelError, match=rf"device '{device}' cannot be used here.*, expected one such as cpu"
    ):
        load_model(str(tiny_folder("llama")), device=device)


def test_device_map_is_handed_on(tiny_folder, monkeypatch):
    seen = []
    from_pretrained = AutoModel.from_pretrained

    def watch(*arguments, **options):
        seen.append(options.get("device_map"))
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(AutoModel, "from_pretrained", watch)
    model = load_model(str(tiny_folder("llama")), device_map={"": "cpu"})
    assert seen == [{"": "cpu"}]
    assert model.forward(make_batch([5, 6]), ["norm"])["norm"].device.type == "cpu"


def test_missing_weights_are_refused(tiny_folder, tmp_path):
    folder = copy_with(tiny_folder("llama"), tmp_path / "m", lambda t: t.pop("layers.1.mlp.down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 weights are missing .* \(layers.1.mlp.down_proj.weight\)"):
        load_model(folder, device="cpu")


def test_weights_without_a_place_are_refused(tiny_folder, tmp_path):
    folder = copy_with(
        tiny_folder("llama"),
        tmp_path / "m",
        lambda t: t.update({"layers.9.mlp.down_proj.weight": torch.zeros(1)}),
    )
    with pytest.raises(CheckpointError, match=r"1 weights have no place in the model \(layers.9"):
        load_model(folder, device="cpu")


def test_weights_of_another_shape_are_refused(tiny_folder, tmp_path):
    folder = copy_with(
        tiny_folder("llama"), tmp_path / "m", lambda t: t.update({"norm.weight": torch.zeros(3)})
    )
    with pytest.raises(
        CheckpointError,
        match=r"1 weights have another shape \(norm.weight is \(3,\), expected \(16,\)\); check",
    ):
        load_model(folder, device="cpu")


def test_weights_of_fewer_blocks_than_stated_are_refused(tiny_folder, tmp_path):
    def drop_last(tensors):
        for key in [key for key in tensors if key.startswith("layers.2.")]:
            del tensors[key]

    folder = copy_with(tiny_folder("llama"), tmp_path / "m", drop_last)
    with pytest.raises(
        CheckpointError, match=r"9 weights are missing and would be random \(layers.2.*4 more"
    ):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": "wide"}, r"\(Validation error for field 'hidden_size': TypeError: .*\)"),
        ({"num_attention_heads": 0}, r"\(integer modulo by zero\)"),
        ({"hidden_act": "nothing"}, r"describes no model that transformers builds .*; check config.json"),
        ({"num_hidden_layers": 0}, "holds no list of blocks"),
    ],
)
@pytest.mark.parametrize("use", [load_model, describe_layers])
def test_nonsense_in_a_configuration_is_one_line(use, change, problem, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=problem) as caught:
        use(str(tmp_path / "m"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"dtype": []}, {"hidden_size": 1 << 40, "intermediate_size": 1 << 40}], ids=str
)
def test_nonsense_in_a_striped_hyena_configuration_is_one_line(change, tmp_path):
    build_striped_hyena().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    for use in (load_model, describe_layers):
        with pytest.raises(ModelError, match=re.escape(str(tmp_path / "m"))) as caught:
            use(str(tmp_path / "m"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"intermediate_size": 352.0}, {"state_size": "wide"}, {"hcm_filter_groups": True}], ids=str
)
def test_fields_of_a_wrong_kind_in_a_striped_hyena_configuration_are_named(change, tmp_path):
    build_striped_hyena().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    ((name, value),) = change.items()
    expected = f"{name} is {value!r}, expected a whole number above 0\nin the config.json of model"
    for use in (load_model, describe_layers):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            use(str(tmp_path / "m"))


@pytest.mark.parametrize("content", ["{", "[]", ""])
@pytest.mark.parametrize("use", [load_model, describe_layers])
def test_damaged_configuration_is_named(use, content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"its config.json (cannot be read|is of no kind)"):
        use(str(tmp_path))


def test_problem_of_our_own_configuration_says_where(tmp_path):
    content = {"model_type": "striped_hyena2", "num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="name each of the 5 blocks") as caught:
        load_model(str(tmp_path), device="cpu")
    assert caught.value.__notes__ == [f"in the config.json of model {str(tmp_path)!r}"]


def test_package_that_remote_code_needs_is_named(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("custom_conv"), tmp_path / "m")
    code = tmp_path / "m" / "modeling_tiny_conv.py"
    code.write_text(f"import no_such_package_at_all\n{code.read_text()}")
    with pytest.raises(ModelError, match=r"needs packages that are not here \(.*no_such_package_at_all"):
        load_model(str(tmp_path / "m"), device="cpu", trust_remote_code=True)


def test_computed_buffers_of_older_releases_are_forgiven(tiny_folder, tmp_path):
    folder = copy_with(
        tiny_folder("llama"),
        tmp_path / "m",
        lambda t: t.update({"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
    )
    assert load_model(folder, device="cpu").untrained == ()


@pytest.mark.parametrize(("family", "head"), [("bert", BertForMaskedLM), ("llama", LlamaForCausalLM)])
def test_heads_are_left_behind(family, head, tiny_folder, tmp_path):
    torch.manual_seed(1)
    whole = head(build_config(family)).eval()
    folder = with_tokenizer(whole, tmp_path / "m", tiny_folder(family))
    model = load_model(folder, device="cpu", dtype="float32")
    assert type(model.module).__name__ == type(whole.base_model).__name__
    batch = make_batch([5, 6, 7, 8])
    (layer,) = model.resolve(1)
    captured = model.forward(batch, [layer.path])[layer.path]
    with torch.inference_mode():
        states = whole(batch.input_ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(captured, states[2], rtol=0, atol=1e-6)


def test_pooler_without_weights_is_fine_but_cannot_be_captured(tiny_folder, tmp_path):
    folder = copy_with(
        tiny_folder("bert"),
        tmp_path / "m",
        lambda t: [t.pop(key) for key in ("pooler.dense.weight", "pooler.dense.bias")],
    )
    model = load_model(folder, device="cpu")
    assert model.untrained == ("pooler",)
    assert not any(layer.path.startswith("pooler") for layer in model.layers)
    assert any(layer.path == "encoder.layer.2" for layer in model.layers)
    with pytest.raises(LayerError, match=r"'pooler.dense' .* holds no weights for it"):
        model.resolve("pooler.dense")


def test_encoder_of_an_encoder_decoder_is_taken(tiny_folder, tmp_path):
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=32)
    folder = with_tokenizer(T5ForConditionalGeneration(config), tmp_path / "m", tiny_folder("llama"))
    model = load_model(folder, device="cpu")
    assert [layer.path for layer in model.resolve([-1, "final"])] == ["block.1", "final_layer_norm"]
    assert (model.is_causal, model.accepts_attention_mask) == (False, True)


def test_damaged_weights_are_named(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(CheckpointError, match=r"cannot be read or do not fit config.json"):
        load_model(str(tmp_path / "m"), device="cpu")


def test_absent_weights_are_named(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights were found"):
        load_model(str(tmp_path / "m"), device="cpu")


def test_pickled_weights_with_code_are_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({**tensors, "code": Path}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot be read or do not fit config.json"):
        load_model(str(tmp_path / "m"), device="cpu")


def test_unknown_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-kind"}))
    with pytest.raises(ModelError, match="of no kind that transformers reads"):
        load_model(str(tmp_path), device="cpu")


def test_absent_tokenizer_is_an_error(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("bert"), tmp_path / "m")
    for name in TOKENIZER_FILES:
        (tmp_path / "m" / name).unlink()
    with pytest.raises(ModelError, match=r"tokenizer .*; save the model's tokenizer into its folder"):
        load_model(str(tmp_path / "m"), device="cpu")


def test_unknown_name_gets_near_names(monkeypatch):
    def refuse(*_, **__):
        message = "no network"
        raise OSError(message)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ModelNotFoundError, match=r"'evo2-7b': not found: .* did you mean 'evo2_7b'"):
        load_model("evo2-7b")
    with pytest.raises(
        ModelNotFoundError,
        match=r"'a/evo2-7b': no such model .*offline mode .* did you mean 'evo2_7b'",
    ):
        load_model("a/evo2-7b")


def test_forward_reduces_on_the_fly(tiny_model, padded_batch):
    model = tiny_model("modernbert")
    shapes = []

    def reduce(path, hidden):
        shapes.append((path, tuple(hidden.shape)))
        return hidden.mean(1)

    pooled = model.forward(padded_batch, ["final_norm", "layers.0"], reduce)
    assert shapes == [("layers.0", (3, 10, 16)), ("final_norm", (3, 10, 16))]
    assert [(path, tuple(value.shape)) for path, value in pooled.items()] == [
        ("final_norm", (3, 16)),
        ("layers.0", (3, 16)),
    ]


def test_forward_refuses_what_is_no_vector_a_token(tiny_model, batch):
    with pytest.raises(LayerError, match=r"gives shape \(2, 16\), expected one vector per token"):
        tiny_model("bert").forward(batch, ["pooler"])


def test_forward_lays_unpadded_rows_out_again(tiny_model, padded_batch):
    model = tiny_model("bert")
    real = padded_batch.attention_mask.bool()
    block = model.module.encoder.layer[0]
    whole = model.forward(padded_batch, ["encoder.layer.0"])["encoder.layer.0"]
    handle = block.register_forward_hook(lambda _module, _inputs, output: output[real])
    try:
        rows = model.forward(padded_batch, ["encoder.layer.0"])["encoder.layer.0"]
    finally:
        handle.remove()
    assert torch.equal(rows[real], whole[real])
    assert not rows[~real].any()


def test_forward_restores_the_mode_it_found(tiny_model, batch):
    model = tiny_model("llama")
    model.module.train()
    try:
        model.forward(batch, ["layers.0"])
        assert model.module.training
    finally:
        model.module.eval()


def test_loading_warns_of_nothing(tiny_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(tiny_folder("gpt_neox")), device="cpu")
