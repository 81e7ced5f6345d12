"""The YAML of original checkpoints, read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from genoembed.errors import ConfigError, InputFileError
from genoembed.models.striped_hyena2.convert import read_vortex_config, vortex_arguments

GOLDEN = Path(__file__).parents[1] / "golden"


def changed(folder: Path, *, drop: str | None = None, **changes) -> Path:
    content = yaml.safe_load((GOLDEN / "b_1m" / "config.yml").read_text())
    content.update(changes)
    content.pop(drop, None)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_golden_configurations_are_read():
    base = read_vortex_config(GOLDEN / "a_base" / "config.yml")
    assert (base.num_hidden_layers, base.hidden_size, base.intermediate_size) == (11, 64, 176)
    assert (base.rotary_emb_scaling_factor, base.max_position_embeddings) == (1.0, 8192)
    long = read_vortex_config(GOLDEN / "b_1m" / "config.yml")
    assert (long.hcs_filter_groups, long.hcm_filter_groups, long.hcl_layer_idxs) == (12, 6, [0, 5])
    assert (long.rotary_emb_scaling_factor, long.rms_norm_eps) == (128.0, 1e-6)


def test_factor_without_interpolation_has_no_effect(tmp_path):
    config = read_vortex_config(changed(tmp_path, use_interpolated_rotary_pos_emb=False))
    assert config.rotary_emb_scaling_factor == 1.0


def test_absent_inner_size_is_rounded_up():
    assert vortex_arguments({"hidden_size": 50, "inner_size_multiple_of": 16})["intermediate_size"] == 144


@pytest.mark.parametrize(
    ("drop", "changes", "expected"),
    [
        (None, {"hiden_size": 3}, "key 'hiden_size' is not known; did you mean 'hidden_size'"),
        (None, {"zzz": 3}, "key 'zzz' is not known; remove it"),
        ("state_size", {}, "key 'state_size' is missing; add it"),
        (None, {"column_split": False}, "column_split is False, expected True"),
        (None, {"tie_embeddings": False}, "tie_embeddings is False, expected True"),
        (None, {"proj_groups": 2}, "proj_groups is 2, expected 1"),
        ("rotary_emb_scaling_factor", {}, "without rotary_emb_scaling_factor; add the factor"),
        (None, {"num_layers": 9}, "four layer lists must name each"),
    ],
)
def test_problems_are_named(drop, changes, expected, tmp_path):
    with pytest.raises(ConfigError, match=expected):
        read_vortex_config(changed(tmp_path, drop=drop, **changes))


def test_all_problems_come_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"zzz.*state_size.*proj_groups") as caught:
        read_vortex_config(changed(tmp_path, drop="state_size", zzz=1, proj_groups=2))
    assert len(caught.value.problems) == 3


def test_what_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "list.yml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="holds a list, expected one mapping"):
        read_vortex_config(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_vortex_config(path)
    path.write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match=r"is not YAML \(ConstructorError\)"):
        read_vortex_config(path)
    with pytest.raises(InputFileError, match="cannot be read"):
        read_vortex_config(tmp_path / "absent.yml")
