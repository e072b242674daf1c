import json

import pytest

from hf_forward_inf.cli import main


@pytest.fixture
def losses(cache):
    folder = cache / "passes" / "model"
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / name).write_bytes(b"x" * 1000)
    return folder


def test_the_cache_is_shown_by_kind(losses, cache, capsys):
    assert main(["cache"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{cache}\n")
    assert "losses of candidates" in printed and "3.0 kB" in printed and "Limit: 20.0 GB" in printed


def test_pruning_leaves_the_size_that_is_asked_for(losses, capsys):
    assert main(["cache", "prune", "--keep", "2KB"]) == 0
    assert capsys.readouterr().out == "1 entries removed, 1.0 kB.\n"
    assert len(list(losses.iterdir())) == 2


def test_clearing_leaves_nothing_and_says_so_to_programs(losses, cache, capsys):
    assert main(["cache", "clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(cache), "bytes": 0, "removed_bytes": 3000}
    assert not list(losses.iterdir())


def test_a_size_that_is_none_is_refused_in_a_line(losses, capsys):
    assert main(["cache", "prune", "--keep", "little"]) == 1
    assert capsys.readouterr().err.startswith("error: 'little' is no size")
    assert len(list(losses.iterdir())) == 3
