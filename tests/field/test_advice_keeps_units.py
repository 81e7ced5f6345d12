"""A file whose last record holds a bad letter, as users send them: the advice of the error loses no work."""

from __future__ import annotations

from pathlib import Path

import pytest

import genoembed
from genoembed.errors import InputError, StoreError
from tests.by_hand import build_family

SOURCE = Path(__file__).parent / "13-policy-remedy-drops-units" / "in.fa"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_family("llama", tmp_path_factory.mktemp("tiny"))


def stopped(tmp_path, model, text, **options):
    """Run into an error, and say how many units are finished."""
    file, output = tmp_path / "in.fa", tmp_path / "out.h5"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        genoembed.extract(file, model=model, layers=0, unit_bases=500, output=output, **options)
    finished = len(list(tmp_path.glob("out.parts/unit-*.json")))
    assert finished > 0
    return finished, str(caught.value), file, output


@pytest.mark.parametrize(
    ("spoil", "advised", "more"),
    [
        (lambda text: text, "invalid='mask'", {"invalid": "mask"}),
        (lambda text: text, "invalid='mask'", {"invalid": "skip"}),
        (lambda text: text.translate({ord("J"): "-"}), "gaps='strip'", {"gaps": "strip"}),
        (lambda _: good() + ">none\n", "empty='skip'", {"empty": "skip"}),
        (lambda _: good() + good(), "duplicates='suffix'", {"duplicates": "suffix"}),
    ],
)
def test_advice_of_the_error_keeps_finished_units(tmp_path, model, spoil, advised, more):
    finished, said, file, output = stopped(tmp_path, model, spoil(SOURCE.read_text()))
    assert advised in said
    report = genoembed.extract(file, model=model, layers=0, unit_bases=500, output=output, **more)
    assert report.stats.units_kept == finished
    plain = genoembed.extract(
        file, model=model, layers=0, unit_bases=500, output=tmp_path / "plain.h5", **more
    )
    assert plain.num_rows == report.num_rows


def good():
    """The records before the bad one."""
    records = SOURCE.read_text().split(">")[1:]
    return "".join(f">{record}" for record in records if set(record.partition("\n")[2]) <= set("ACGTN\n"))


def test_policy_that_changes_a_finished_unit_is_refused(tmp_path, model):
    first, _, rest = good().partition("\n")
    text = f"{first}\nJ{rest}{SOURCE.read_text().rpartition('>')[2]}>"
    _, _, file, output = stopped(tmp_path, model, text, invalid="mask")
    with pytest.raises(
        StoreError, match=r"unit 0 was made from other sequences .*invalid was 'mask' and is 'skip'"
    ):
        genoembed.extract(
            file, model=model, layers=0, unit_bases=500, output=output, invalid="skip", empty="skip"
        )
