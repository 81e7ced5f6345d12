"""Configurations: what is refused, in which words, and what is written down."""

from __future__ import annotations

import dataclasses
import json

import pytest

from genoembed.config.embed import (
    OPTION_STAGE,
    EmbedConfig,
    InputConfig,
    default_output,
    embed_config,
)
from genoembed.errors import ConfigError

INPUTS = ("a.fa",)

REFUSED = [
    ({"inputs": ()}, r"^inputs is empty; name at least one sequence file, or '-' for standard input$"),
    ({"inputs": "a.fa"}, r"^inputs is 'a\.fa'; set inputs to a tuple, each item a text$"),
    ({"flank": -1}, r"^flank is -1; set flank to 0 or more bases$"),
    ({"flank": "3"}, r"^flank is '3'; set flank to a whole number$"),
    ({"flank": 3}, r"^flank is 3, but there are no regions; set regions$"),
    ({"invalid": "drop"}, r"^invalid is 'drop'; set invalid to one of error, skip, mask$"),
    ({"duplicates": "skip"}, r"^duplicates is 'skip'; set duplicates to one of error, suffix$"),
    ({"empty": "mask"}, r"^empty is 'mask'; set empty to one of error, skip$"),
    ({"gaps": None}, r"^gaps is None; set gaps to one of error, strip$"),
    ({"keep_case": 1}, r"^keep_case is 1; set keep_case to True or False$"),
    ({"model": 7}, r"^model is 7; set model to a text$"),
    ({"revision": 7}, r"^revision is 7; set revision to a text, or leave it out$"),
    ({"dtype": "fp8"}, r"^dtype is 'fp8'; set dtype to one of auto, float32, bfloat16, float16$"),
    ({"dtype": ["float32"]}, r"^dtype is \['float32'\]; set dtype to one of auto"),
    ({"threads": 0}, r"^threads is 0; set threads to 1 or more$"),
    ({"threads": 1.5}, r"^threads is 1\.5; set threads to a whole number, or leave it out$"),
    ({"batch_tokens": 0}, r"^batch_tokens is 0; set batch_tokens to 1 or more slots$"),
    ({"batch_tokens": True}, r"^batch_tokens is True; set batch_tokens to a whole number, or leave it out$"),
    ({"layers": ()}, r"^layers is empty; name at least one layer, or leave it out for 'final'$"),
    ({"layers": (28,)}, r"^layers is \(28,\); set layers to a tuple, each item a text$"),
    ({"pooling": "avg"}, r"^pooling is 'avg'; set pooling to one of mean, max, first, last, cls"),
    ({"skip_first": -2}, r"^skip_first is -2; set skip_first to 0 or more bases$"),
    ({"skip_first": 2, "pooling": "none"}, r"^skip_first leaves bases out of pooling, but pooling is 'none'"),
    ({"fusion": "sum"}, r"^fusion is 'sum'; set fusion to one of none, concat, mean, max, weighted$"),
    ({"fusion": "weighted"}, r"^fusion is 'weighted' without fusion_weights; give one weight a layer$"),
    ({"fusion_weights": (1.0,)}, r"^fusion_weights are given, but fusion is 'none'; set fusion='weighted'$"),
    ({"fusion": "weighted", "fusion_weights": ("1",)}, r"set fusion_weights to a tuple, each item a number$"),
    ({"fusion": "weighted", "fusion_weights": (0, 0.0)}, r"^fusion_weights is \[0, 0\.0\]; give finite"),
    ({"fusion": "weighted", "fusion_weights": (1, -1)}, r"none below 0, and not all 0$"),
    ({"fusion": "weighted", "fusion_weights": (float("nan"),)}, r"^fusion_weights is \[nan\]; give finite"),
    ({"fusion": "weighted", "fusion_weights": (float("inf"), 1)}, r"give finite numbers"),
    ({"rc": "both"}, r"^rc is 'both'; set rc to one of none, mean, concat$"),
    ({"window": 0}, r"^window is 0; set window to 1 or more bases$"),
    ({"stride": -5}, r"^stride is -5; set stride to 1 or more bases$"),
    ({"window": 10, "stride": 11}, r"^stride is 11, but window is 10: .*set stride to the window or less$"),
    ({"per_window": True, "pooling": "none"}, r"^per_window gives a vector a window.*choose one of the two$"),
    ({"out_dtype": "bfloat16"}, r"^out_dtype is 'bfloat16'; set out_dtype to one of float32, float16$"),
    ({"output": 3}, r"^output is 3; set output to a text$"),
    ({"overwrite": "yes"}, r"^overwrite is 'yes'; set overwrite to True or False$"),
    ({"output": ""}, r"^output is ''; set output to a text that is not empty$"),
    ({"model": ""}, r"^model is ''; set model to a text that is not empty$"),
    ({"device": ""}, r"^device is ''; set device to a text that is not empty, or leave it out$"),
    ({"inputs": ("",)}, r"^inputs is \(''\,\); set inputs to a tuple, each item a text that is not empty$"),
    ({"windw": 10}, r"^'windw' is no option; did you mean 'window'\?$"),
    ({"zzz": 10}, r"^'zzz' is no option$"),
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
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        config.input.flank = 3
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        config.input = InputConfig(inputs=INPUTS)


def test_no_key_belongs_to_two_stages():
    config = embed_config({"inputs": INPUTS})
    stages = [field.name for field in dataclasses.fields(EmbedConfig)]
    keys = [field.name for stage in stages for field in dataclasses.fields(getattr(config, stage))]
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
