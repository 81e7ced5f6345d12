"""StripedHyena 2 as a citizen of transformers: files, devices, generation, Trainer, checkpointing, peft."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from genoembed import CharTokenizer, StripedHyena2Config, StripedHyena2ForCausalLM, StripedHyena2Model
from tests.models.test_striped_hyena2_model import EXACT, letters, tiny_config, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FILTER_KEYS = {
    "hcs": {"filter.short_filter_weight", "filter.h"},
    "hcm": {"filter.short_filter_weight", "filter.h", "filter.D"},
    "hcl": {"filter.short_filter_weight", "filter.log_poles", "filter.residues", "filter.D"},
}
HYENA_KEYS = {"projections.weight", "out_filter_dense.weight", "out_filter_dense.bias"}
ATTENTION_KEYS = {
    "inner_mha_cls.Wqkv.weight",
    "inner_mha_cls.out_proj.weight",
    "inner_mha_cls.out_proj.bias",
    "inner_mha_cls.rotary_emb.inv_freq",
}
BLOCK_KEYS = {"pre_norm.scale", "post_norm.scale", "mlp.l1.weight", "mlp.l2.weight", "mlp.l3.weight"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model with its tokenizer."""
    tiny_model().save_pretrained(tmp_path / "model")
    CharTokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def original_keys(config: StripedHyena2Config) -> set[str]:
    """The stored names of the original, without the duplicate of the embedding."""
    keys = {"embedding_layer.weight", "norm.scale"}
    for index in range(config.num_hidden_layers):
        kind = config.block_kind(index)
        mixer = ATTENTION_KEYS if kind == "attention" else HYENA_KEYS | FILTER_KEYS[kind]
        keys |= {f"blocks.{index}.{name}" for name in BLOCK_KEYS | mixer}
    return keys


def equal_states(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models hold the same bits under the same names."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_saved_folder_holds_original_names_and_opens_through_every_auto_class(folder) -> None:
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == original_keys(tiny_config())
    model = tiny_model()
    whole, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    base, base_info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert not any(base_info.values())
    assert type(whole) is StripedHyena2ForCausalLM
    assert type(base) is StripedHyena2Model
    assert equal_states(whole, model)
    assert equal_states(base, model)
    ids = letters(2, 40)
    assert torch.equal(whole(ids).logits, model(ids).logits)
    assert torch.equal(base(ids).last_hidden_state, model(ids, output_hidden_states=True).hidden_states[-1])
    assert type(AutoConfig.from_pretrained(folder)) is StripedHyena2Config
    assert type(AutoTokenizer.from_pretrained(folder)) is CharTokenizer


def test_base_model_folder_opens_as_causal_model(tmp_path) -> None:
    base = StripedHyena2Model(tiny_config())
    base.save_pretrained(tmp_path)
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert equal_states(whole, base)


def test_shards_round_trip_bitwise(tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert equal_states(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_poles_residues_and_frequencies(folder, dtype, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    again = _resaved(model, tmp_path / "again")
    for loaded in (model, again):
        for key, value in loaded.state_dict().items():
            assert value.dtype == (torch.float32 if key.endswith(EXACT) else dtype), key
    original = tiny_model().state_dict()
    assert all(torch.equal(model.state_dict()[key], original[key]) for key in original if key.endswith(EXACT))
    ids = letters(2, 30)
    assert model(ids).logits.dtype == dtype
    assert model(ids).logits.isfinite().all()
    assert torch.equal(again(ids).logits, model(ids).logits)


def _resaved(model: StripedHyena2ForCausalLM, path: Path) -> StripedHyena2ForCausalLM:
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


@pytest.mark.parametrize("method", ["bfloat16", "half", "to"])
def test_casting_a_model_keeps_poles_residues_and_frequencies(folder, method) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16 if method == "half" else torch.bfloat16
    )
    model = tiny_model()
    model = model.to(torch.bfloat16) if method == "to" else getattr(model, method)()
    assert equal_states(model, loaded)
    assert all(
        map(lambda a, b: a.dtype == b.dtype, model.state_dict().values(), loaded.state_dict().values())
    )
    assert tiny_model().double().blocks[0].filter.log_poles.dtype == torch.float64


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map_gives_the_same_model(folder, device_map) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    ids = letters(2, 30).to(model.device)
    assert torch.allclose(model(ids).logits.cpu(), tiny_model()(ids.cpu()).logits, atol=1e-4)


def test_blocks_may_live_on_disk(folder, tmp_path, caplog) -> None:
    placement = {f"blocks.{index}": "disk" if index else "cpu" for index in range(5)}
    placement |= {"embedding_layer": "cpu", "norm": "cpu"}
    with caplog.at_level(logging.ERROR):
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map=placement, offload_folder=tmp_path / "offload"
        )
    assert next(model.blocks[2].parameters()).is_meta
    ids = letters(2, 30)
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)


@pytest.mark.parametrize(
    "missing",
    [
        "embedding_layer.weight",
        "norm.scale",
        "blocks.0.filter.log_poles",
        "blocks.0.filter.residues",
        "blocks.0.out_filter_dense.weight",
        "blocks.0.out_filter_dense.bias",
        "blocks.1.inner_mha_cls.Wqkv.weight",
        "blocks.1.inner_mha_cls.rotary_emb.inv_freq",
        "blocks.2.filter.h",
        "blocks.3.filter.short_filter_weight",
        "blocks.4.mlp.l3.weight",
    ],
)
def test_loading_initializes_what_is_missing_and_nothing_else(folder, missing) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path)
    absent = stored.pop(missing)
    save_file(stored, path, metadata={"format": "pt"})
    torch.manual_seed(5)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {missing}
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    fresh = state[missing]
    assert fresh.shape == absent.shape
    assert fresh.isfinite().all()
    if missing.endswith("inv_freq"):
        assert torch.equal(fresh, absent)  # the default, rounded to bfloat16 as in the released files
        assert torch.equal(fresh, fresh.bfloat16().float())
    elif missing.endswith("log_poles"):
        assert (fresh < 0).all()
    elif not missing.endswith((".scale", ".bias")):
        assert 0 < fresh.std() < 1


def test_initialization_is_small_where_it_writes_to_the_stream() -> None:
    torch.manual_seed(0)
    model = StripedHyena2ForCausalLM(tiny_config(hidden_size=128, intermediate_size=256))
    for block in model.blocks:
        last = block.inner_mha_cls.out_proj if hasattr(block, "inner_mha_cls") else block.out_filter_dense
        assert last.weight.std().item() == pytest.approx((2 * 5 * 128) ** -0.5, rel=0.1)
        assert block.mlp.l3.weight.std().item() == pytest.approx((2 * 5 * 256) ** -0.5, rel=0.1)
        assert block.mlp.l1.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)


@torch.inference_mode()
def test_greedy_generation_is_stepwise_argmax() -> None:
    model, ids = tiny_model(), letters(2, 20)
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1)
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, expected)


@torch.inference_mode()
def test_greedy_generation_of_a_left_padded_batch_equals_each_row_alone() -> None:
    model = tiny_model()
    tokenizer = CharTokenizer(padding_side="left")
    texts = ["ACGTTGCA", "GG", "TTTACGACGGGT"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    together = model.generate(**batch, **options)
    assert batch["attention_mask"][1].tolist() == [0] * 10 + [1] * 2
    for row, text in zip(together, texts, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)
        assert torch.equal(row[12 - len(text) :], alone[0])


@torch.inference_mode()
def test_generation_samples_searches_and_stops_at_the_end_token() -> None:
    model, ids = tiny_model(), letters(2, 10)
    torch.manual_seed(0)
    assert model.generate(ids, max_new_tokens=4, do_sample=True, top_k=4).shape[0] == 2
    assert model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False).shape[0] == 2
    first = model(ids[:1]).logits[0, -1].argmax().item()
    stopped = model.generate(ids[:1], max_new_tokens=4, do_sample=False, eos_token_id=first, pad_token_id=1)
    assert stopped[0, 10:].tolist() == [first]


@torch.inference_mode()
def test_embedding_can_be_resized_and_stays_tied() -> None:
    model, ids = tiny_model(), letters(1, 10)
    before = model(ids).logits
    model.resize_token_embeddings(520, mean_resizing=False)
    after = model(ids).logits
    assert model.config.vocab_size == 520
    assert after.shape == (1, 10, 520)
    assert torch.allclose(after[..., :512], before, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant) -> None:
    plain, saving = tiny_model().train(), tiny_model().train()
    saving.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert saving.is_activation_checkpointing
    calls: list[int] = []
    saving.blocks[2].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = letters(2, 140)
    losses = [model(ids, labels=ids).loss for model in (plain, saving)]
    for loss in losses:
        loss.backward()
    assert len(calls) == 2  # once forward, once again on the way back
    assert torch.equal(*losses)
    for (key, expected), ours in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, rtol=1e-4, atol=1e-7), key


def _examples(count: int) -> list[dict[str, Tensor]]:
    rows = letters(1, 40).expand(count, 40)
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in rows]


def _arguments(path: Path, **changes: object) -> TrainingArguments:
    options: dict[str, object] = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(output_dir=str(path), **{**options, **changes})


def test_trainer_lowers_the_loss_saves_and_evaluates(tmp_path) -> None:
    model = tiny_model()
    examples = _examples(8)
    trainer = Trainer(model, _arguments(tmp_path), train_dataset=examples, eval_dataset=examples)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model(str(tmp_path / "saved"))
    assert equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)


def test_trainer_accumulation_averages_over_all_labels(tmp_path) -> None:
    # one batch of four rows and two of two give one and the same first step
    weights = []
    for rows, steps in ((4, 1), (2, 2)):
        model, examples = tiny_model(), _examples(4)
        examples[0]["labels"][:30] = -100
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, "max_steps": 1}
        Trainer(model, _arguments(tmp_path, optim="sgd", **options), train_dataset=examples).train()
        weights.append(copy.deepcopy(model.state_dict()))
    moved = tiny_model().state_dict()
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-6) for key in moved)
    assert not torch.allclose(weights[0]["embedding_layer.weight"], moved["embedding_layer.weight"])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_lora_trains_on_every_kind_of_projection_and_merges(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["l1", "l2", "l3", "projections", "out_filter_dense", "Wqkv", "out_proj"]
    model = tiny_model()
    original = {key: value.clone() for key, value in model.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    trainable = [key for key, value in adapted.named_parameters() if value.requires_grad]
    assert len(trainable) == 2 * (5 * 3 + 3 * 2 + 2 * 2)
    Trainer(adapted, _arguments(tmp_path), train_dataset=_examples(6)).train()
    moved = dict(adapted.named_parameters())
    assert all((moved[key] != 0).any() for key in trainable)
    ids = letters(2, 30)
    adapted.eval()
    expected = adapted(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
    assert merged.state_dict().keys() == original.keys()
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, original[key])}
    assert changed == {key for key in original if key.split(".")[-2] in targets and key.endswith("weight")}
