import os
import time

import pytest

from hf_forward_inf.utils.cache import (
    cache_limit,
    enforce_limit,
    entries,
    mark_used,
    prune,
)

DAY = 86400


@pytest.fixture
def filled(cache):
    """Three files of a hundred bytes and a folder of as much, each used a day after the one before."""
    names = ("passes/model/old", "encoded/newer", "models/folder/weights", "curvature/newest")
    for days, name in enumerate(names):
        path = cache / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (time.time() - (len(names) - days) * DAY,) * 2)
    (cache / "others").mkdir()
    (cache / "others" / "file").write_bytes(b"x" * 1000)
    return cache


def test_entries_are_files_and_folders_of_known_kinds_used_longest_ago_first(filled):
    assert [entry.path.name for entry in entries(filled)] == ["old", "newer", "folder", "newest"]
    assert [entry.size for entry in entries(filled)] == [100] * 4
    assert [entry.kind for entry in entries(filled)] == ["passes", "encoded", "models", "curvature"]


def test_what_was_used_longest_ago_is_removed_first(filled):
    mark_used(filled / "passes" / "model" / "old")
    assert [entry.path.name for entry in prune(filled, 250)] == ["newer", "folder"]
    assert [entry.path.name for entry in entries(filled)] == ["newest", "old"]
    assert (filled / "others" / "file").exists()


def test_marking_a_file_as_used_leaves_the_time_of_its_writing(filled):
    path = filled / "passes" / "model" / "old"
    written = path.stat().st_mtime_ns
    mark_used(path)
    assert path.stat().st_mtime_ns == written


def test_the_limit_is_enforced_once_but_not_on_what_is_in_use(filled, monkeypatch):
    monkeypatch.setattr("hf_forward_inf.utils.cache._checked", set())
    monkeypatch.setenv("HF_FORWARD_INF_CACHE_LIMIT", "150B")
    mark_used(filled / "curvature" / "newest")
    mark_used(filled / "models" / "folder" / "weights")
    with pytest.warns(UserWarning, match="larger than HF_FORWARD_INF_CACHE_LIMIT=150B: the 200 B that were used"):
        enforce_limit(filled)
    assert {entry.path.name for entry in entries(filled)} == {"newest", "folder"}
    (filled / "passes" / "model" / "another").write_bytes(b"x" * 1000)
    enforce_limit(filled)  # once in a process
    assert len(entries(filled)) == 3


def test_a_limit_that_is_no_size_is_refused(monkeypatch):
    monkeypatch.setenv("HF_FORWARD_INF_CACHE_LIMIT", "ten")
    with pytest.raises(ValueError, match="HF_FORWARD_INF_CACHE_LIMIT: 'ten' is no size"):
        cache_limit()
    monkeypatch.setenv("HF_FORWARD_INF_CACHE_LIMIT", "none")
    assert cache_limit() is None
