"""Configurations: what is refused, in which words, and what is written down."""

from __future__ import annotations

import json
import pickle

import pytest
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

import genoembed
from genoembed.cli import COMMANDS, main
from genoembed.config.embed import (
    OPTION_STAGE,
    InputConfig,
    default_output,
    embed_config,
)
from genoembed.config.finetune import finetune_config
from genoembed.errors import ConfigError, Problem, Remedy, StoreError
from genoembed.sklearn import SequenceEmbedder

INPUTS = ("a.fa",)

REFUSED = [
    ({"inputs": ()}, r"^inputs is empty; name at least one sequence file, or '-' for standard input$"),
    ({"flank": -1}, r"^flank is -1; set flank to 0 or more bases$"),
    ({"flank": "3"}, r"^flank is '3'; set flank to a whole number$"),
    (
        {"flank": 3},
        r"^flank is 3, but there are no regions; "
        r"set regions to a BED or GFF3 file, or a place such as chr1:1001-2000$",
    ),
    ({"invalid": "drop"}, r"^invalid is 'drop'; set invalid to one of error, skip, mask$"),
    ({"duplicates": "skip"}, r"^duplicates is 'skip'; set duplicates to one of error, suffix$"),
    ({"empty": "mask"}, r"^empty is 'mask'; set empty to one of error, skip$"),
    ({"keep_case": 1}, r"^keep_case is 1; set keep_case to True or False$"),
    ({"model": 7}, r"^model is 7; set model to a text$"),
    ({"revision": 7}, r"^revision is 7; set revision to a text, or leave it out$"),
    ({"dtype": "fp8"}, r"^dtype is 'fp8'; set dtype to one of auto, float32, bfloat16, float16$"),
    ({"dtype": ["float32"]}, r"^dtype is \['float32'\]; set dtype to one of auto"),
    ({"threads": 0}, r"^threads is 0; set threads to 1 or more$"),
    ({"threads": 1.5}, r"^threads is 1\.5; set threads to a whole number, or leave it out$"),
    ({"batch_tokens": 0}, r"^batch_tokens is 0; set batch_tokens to 1 or more tokens$"),
    ({"batch_tokens": True}, r"^batch_tokens is True; set batch_tokens to a whole number, or leave it out$"),
    ({"layers": ()}, r"^layers is empty; name at least one layer, or leave it out for 'final'$"),
    ({"layers": (2.5,)}, r"^layers is \(2\.5,\); set layers to one or several, each a text$"),
    ({"pooling": "avg"}, r"^pooling is 'avg'; set pooling to one of mean, max, first, last, cls"),
    ({"skip_first": -2}, r"^skip_first is -2; set skip_first to 0 or more bases$"),
    ({"skip_first": 2, "pooling": "none"}, r"^skip_first leaves bases out of pooling, but pooling is 'none'"),
    ({"fusion": "sum"}, r"^fusion is 'sum'; set fusion to one of none, concat, mean, max, weighted$"),
    (
        {"fusion": "weighted"},
        r"^fusion is 'weighted', but there are no weights; "
        r"set fusion_weights to one weight per layer, such as 0\.2,0\.8$",
    ),
    ({"fusion_weights": (1.0,)}, r"^fusion_weights are given, but fusion is 'none'; set fusion='weighted'$"),
    (
        {"fusion": "weighted", "fusion_weights": ("1",)},
        r"set fusion_weights to one or several, each a number$",
    ),
    (
        {"fusion": "weighted", "fusion_weights": (0, 0.0)},
        r"^fusion_weights is \[0\.0, 0\.0\]; set fusion_weights to numbers from 0 on",
    ),
    ({"fusion": "weighted", "fusion_weights": (1, -1)}, r"numbers from 0 on, not all of them 0$"),
    (
        {"fusion": "weighted", "fusion_weights": (float("nan"),)},
        r"^fusion_weights is \(nan,\); set fusion_weights to one or several",
    ),
    ({"fusion": "weighted", "fusion_weights": (float("inf"), 1)}, r"set fusion_weights to one or several"),
    ({"rc": "both"}, r"^rc is 'both'; set rc to one of none, mean, concat$"),
    ({"window": 0}, r"^window is 0; set window to 1 or more bases$"),
    ({"stride": -5}, r"^stride is -5; set stride to 1 or more bases$"),
    ({"window": 10, "stride": 11}, r"^stride is 11, but window is 10: .*set stride to the window or less$"),
    (
        {"per_window": True, "pooling": "none"},
        r"^per_window gives one vector per window.*choose one of them$",
    ),
    ({"out_dtype": "bfloat16"}, r"^out_dtype is 'bfloat16'; set out_dtype to one of float32, float16$"),
    ({"output": 3}, r"^output is 3; set output to a text$"),
    ({"overwrite": "yes"}, r"^overwrite is 'yes'; set overwrite to True or False$"),
    ({"output": ""}, r"^output is ''; set output to a text that is not empty$"),
    ({"model": ""}, r"^model is ''; set model to a text that is not empty$"),
    ({"device": ""}, r"^device is ''; set device to a text that is not empty, or leave it out$"),
    ({"inputs": ("",)}, r"^inputs is \(''\,\); set inputs to one or several, each a text$"),
    ({"windw": 10}, r"^'windw' is not an option; did you mean 'window'\?$"),
    ({"zzz": 10}, r"^'zzz' is not an option$"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_embed_config_refuses(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        embed_config({"inputs": INPUTS, **options})
    assert len(caught.value.problems) == 1


def test_embed_config_reports_everything_at_once():
    options = {"inputs": INPUTS, "poling": "max", "flank": -1, "threads": 0, "rc": "x", "window": 0}
    with pytest.raises(ConfigError, match="did you mean 'pooling'") as caught:
        embed_config(options)
    found = [problem.split()[0] for problem in caught.value.problems]
    assert found == ["'poling'", "flank", "threads", "rc", "window"]


def test_embed_config_without_inputs_says_so_and_nothing_else():
    with pytest.raises(ConfigError, match=r"^inputs is empty; name at least one sequence file"):
        embed_config({})


def test_embed_config_defaults_are_the_simplest_run():
    config = embed_config({"inputs": INPUTS})
    assert (config.model.model, config.embedding.layers, config.embedding.pooling) == (
        "genoembed-mini",
        ("final",),
        "mean",
    )
    assert config.output.output == "a.h5"
    assert not config.output.overwrite
    assert config == embed_config({"inputs": INPUTS, "output": None})


def test_embed_config_is_frozen():
    config = embed_config({"inputs": INPUTS})
    with pytest.raises(ValidationError, match="Instance is frozen"):
        config.input.flank = 3
    with pytest.raises(ValidationError, match="Instance is frozen"):
        config.input = InputConfig(inputs=INPUTS)


def test_no_key_belongs_to_two_stages():
    config = embed_config({"inputs": INPUTS})
    keys = [key for section in config.sections().values() for key in section.options()]
    assert len(keys) > 20
    assert sorted(keys) == sorted(OPTION_STAGE)


def test_to_dict_survives_json_and_builds_the_same_configuration():
    options = {
        "inputs": ("a.fa", "b.fa"),
        "regions": ("chr1:1-5",),
        "flank": 2,
        "layers": ("0", "final"),
        "fusion": "weighted",
        "fusion_weights": (0.25, 1),
        "window": 30,
    }
    config = embed_config(options)
    read = json.loads(json.dumps(config.to_dict()))
    flat = {
        key: tuple(value) if isinstance(value, list) else value
        for stage in read.values()
        for key, value in stage.items()
    }
    assert embed_config(flat) == config


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("genome.fa", "genome.h5"),
        ("data/genome.v2.fna.gz", "data/genome.v2.h5"),
        ("x.FASTA.ZST", "x.h5"),
        ("x.gb", "x.h5"),
        ("plain", "plain.h5"),
        ("-", "embeddings.h5"),
        (".", "embeddings.h5"),
        ("/", "embeddings.h5"),
        ("", "embeddings.h5"),
    ],
)
def test_default_output_is_the_stem_of_the_first_input(first, expected):
    assert default_output(first) == expected


CALLS = {
    "extract": ("a.fa",),
    "plan": ("a.fa",),
    "embed": (["ACGT"],),
    "merge": ("a.h5",),
    "probe": ("a.fa",),
    "search": ("a.fa", "b.h5"),
    "fit_transform": ("a.h5",),
    "plot": ("a.h5",),
    "score": ("a.fa",),
    "score_mutations": ("a.fa",),
    "score_variants": ("a.vcf", "a.fa"),
    "generate": ("a.fa",),
    "compare": ("a.h5", "b.h5"),
    "verify": ("a.h5",),
    "export": ("a.h5", "npz"),
    "export_model": ("m", "o"),
    "finetune": ("a.tsv", "run"),
    "pretrain": ("a.fa", "run"),
    "predict": ("m", "a.fa"),
}
TYPOS = {
    "merge": ("overwrte", "overwrite"),
    "export": ("overwrte", "overwrite"),
    "compare": ("tolerence", "tolerance"),
    "plot": ("max_point", "max_points"),
    "fit_transform": ("shrinkge", "shrinkage"),
    "export_model": ("trust_remote", "trust_remote_code"),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_python_call_answers_an_unknown_key_with_the_nearest(name):
    typo, near = TYPOS.get(name, ("trust_remot_code", "trust_remote_code"))
    more = {"labels": "l.tsv"} if name == "probe" else {"output": "t.h5"} if name == "fit_transform" else {}
    with pytest.raises(ConfigError) as caught:
        getattr(genoembed, name)(*CALLS[name], **more, **{typo: 1})
    assert f"'{typo}' is not an option; did you mean '{near}'?" in caught.value.problems


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("models", "info", "doctor")])
def test_every_command_answers_an_unknown_option_with_the_nearest(name):
    word = {"layers": "--al", "verify": "--tolerence", "serve": "--devce"}.get(name, "--overwrte")
    near = {"layers": "--all", "verify": "--tolerance", "serve": "--device"}.get(name, "--overwrite")
    result = CliRunner().invoke(main, [name, word, "x"])
    assert result.exit_code == 2
    assert f"'{word}' is not an option; did you mean '{near}'?" in result.stderr


def test_sequence_embedder_answers_an_unknown_key_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^'windw' is not an option; did you mean 'window'\?$"):
        SequenceEmbedder(windw=8)


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("num_train_epochs", "max_epochs"),
        ("per_device_train_batch_size", "rows_per_device"),
        ("fix_encoder", "mode fix_encoder"),
        ("gradient_accumulation_steps", "accumulation_steps"),
        ("negatives_cross_device", "across_devices"),
        ("sentence_pooling_method", "pooling"),
        ("fp16", "dtype float16"),
        ("query_max_len", "max_crop_bp"),
        ("save_steps", "eval_steps"),
    ],
)
def test_names_of_other_toolkits_are_answered_with_ours(foreign, ours, tmp_path):
    sentence = f"'{foreign}' is not an option; here that is '{ours}'"
    with pytest.raises(ConfigError) as caught:
        genoembed.finetune("a.tsv", "run", task="retrieval", **{foreign: 1})
    assert caught.value.problems == (sentence,)
    file = tmp_path / "run.yaml"
    file.write_text(f"task: retrieval\ntrain: a.tsv\n{foreign}: 1\n")
    with pytest.raises(ConfigError) as caught:
        finetune_config({}, file=file)
    assert caught.value.problems == (f"{file}: {sentence}",)


@pytest.mark.parametrize(
    ("former", "today"),
    [("own_negatives_only", "in_batch_negatives=False"), ("kin_identity", "homolog_identity")],
)
def test_former_names_are_answered_as_the_nearest_are(former, today):
    with pytest.raises(ConfigError, match=f"'{former}' is not an option; did you mean '{today}'"):
        finetune_config({"task": "retrieval", "train": "a.tsv", former: 1})


VALUES = {"train": ["a.tsv"], "task": "classification", "layers": [2, "final"], "learning_rate": 0.001}


def test_files_of_all_kinds_flat_or_in_sections_mean_the_same(tmp_path):
    flat_toml = [
        'train = ["a.tsv"]',
        'task = "classification"',
        'layers = [2, "final"]',
        "learning_rate = 1e-3",
    ]
    sections = {
        "data": {"train": ["a.tsv"]},
        "objective": {"task": "classification"},
        "encoder": {"layers": [2, "final"]},
        "recipe": {"learning_rate": 0.001},
    }
    texts = {
        "flat.toml": "\n".join(flat_toml),
        "flat.json": json.dumps(VALUES),
        "flat.yaml": yaml.safe_dump(VALUES),
        "sections.json": json.dumps(sections),
        "sections.yml": yaml.safe_dump(sections),
        "sections.toml": '[data]\ntrain = ["a.tsv"]\n[objective]\ntask = "classification"\n'
        '[encoder]\nlayers = [2, "final"]\n[recipe]\nlearning_rate = 0.001\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert finetune_config({}, file=tmp_path / name) == finetune_config(VALUES), name


def test_stray_key_in_a_section_is_answered_with_the_nearest(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[data]\ntrain = ["a.tsv"]\nsplt = "random"\n[objective]\ntask = "classification"\n')
    with pytest.raises(ConfigError, match=r"run\.toml: 'splt' is not an option; did you mean 'split'\?$"):
        finetune_config({}, file=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dense"}, "^mode is for retrieval, but task is 'classification'; leave mode out$"),
        ({"margin": 2.0}, "^margin is for triplet, but task is 'classification'; leave margin out$"),
        (
            {"lora_rank": 4},
            "^lora_rank is for tuning 'lora', but tuning is not given; set tuning='lora', or leave",
        ),
    ],
)
def test_option_that_does_not_apply_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        finetune_config({"train": "a.tsv", "task": "classification", **options})


def test_errors_with_a_remedy_survive_pickle_and_are_spelled_for_the_reader():
    error = pickle.loads(
        pickle.dumps(StoreError(Problem("is there", Remedy("overwrite", True)), path="x.h5"))
    )
    assert str(error) == "x.h5: is there; set overwrite=True"
    assert error.spelled("--{}".format) == "x.h5: is there; add --overwrite"
