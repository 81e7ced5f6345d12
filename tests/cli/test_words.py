"""What commands say to people: one style of help over all of them, plain words, and no Python in messages."""

from __future__ import annotations

import pytest

from genoembed.errors import _install_command


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, "python -m pip install 'genoembed[analysis]'"),
        ({"url": "file:///gone", "dir_info": {}}, "python -m pip install 'genoembed[analysis]'"),
        (
            {"url": "https://host.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "1a2b"}},
            "python -m pip install 'genoembed[analysis] @ git+https://host.org/a.git@1a2b'",
        ),
        (
            {"url": "https://host.org/genoembed-1-py3-none-any.whl", "archive_info": {}},
            "python -m pip install 'genoembed[analysis] @ https://host.org/genoembed-1-py3-none-any.whl'",
        ),
    ],
)
def test_missing_extra_is_installed_from_where_the_package_came(record, expected, tmp_path):
    assert _install_command("analysis", record, imported_from=tmp_path) == expected


def test_missing_extra_is_installed_from_the_clone(tmp_path):
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    record = {"url": clone.as_uri(), "dir_info": {"editable": False}}
    assert _install_command("search", record, imported_from=tmp_path) == (
        f"python -m pip install '{clone}[search]'"
    )
    (clone / "constraints.txt").touch()
    assert _install_command("search", {}, imported_from=clone) == (
        f"python -m pip install -c '{clone}/constraints.txt' -e '{clone}[search]'"
    )
