import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from hf_forward_inf.utils.storage import (
    cached_tensors,
    clear,
    finish,
    machine,
    temporary_folder,
    write_all,
    write_folder,
    written,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_at_once_and_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(KeyboardInterrupt), written(tmp_path / "file") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "before"
    with written(tmp_path / "file") as part:
        part.write_text("after")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "after"


def test_temporary_folders_of_dead_processes_alone_are_deleted(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = tmp_path / f".writing-{machine()}-{ended.stdout.strip()}-abc"
    alive = tmp_path / f".writing-{machine()}-{os.getppid()}-abc"
    elsewhere = tmp_path / f".writing-another-machine-{ended.stdout.strip()}-abc"
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
        (folder / "part").write_text("half")
    with temporary_folder(tmp_path):
        pass
    assert names(tmp_path) == sorted([alive.name, elsewhere.name])


@contextmanager
def little_room():
    """Let no file grow beyond 4096 bytes, as if the disk were full: pytest's own output, too, so only for a moment."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_with_the_path_and_the_space_and_leaves_nothing(tmp_path):
    named = r"no room for .*big\.safetensors: it needs 40,000 bytes, and [\d,]+ are free"
    with pytest.raises(OSError, match=named), little_room():
        cached_tensors(tmp_path / "big.safetensors", lambda: {"w": torch.zeros(10_000)})
    with pytest.raises(OSError, match=r"no room for .*folder: it needs more than [\d,]+ bytes"), little_room():
        write_folder(tmp_path / "folder", lambda part: (part / "file").write_bytes(bytes(5000)))
    assert names(tmp_path) == []


def test_a_folder_that_another_process_wrote_meanwhile_stays(tmp_path):
    def slow(part):
        write_folder(tmp_path / "folder", lambda other: (other / "file").write_text("first"))
        (part / "file").write_text("second")

    write_folder(tmp_path / "folder", slow)
    assert (tmp_path / "folder" / "file").read_text() == "first"
    with pytest.raises(FileExistsError):
        write_folder(tmp_path / "other", lambda part: part.mkdir())
    assert names(tmp_path) == ["folder"]


def folder_of(text):
    def write(path):
        path.mkdir()
        (path / "inside").write_text(text)

    return write


def run_of(text, **more):
    return {"a": folder_of(text), "b.json": lambda path: path.write_text(text), **more}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


NEW = {"a/inside": "new", "b.json": "new", "users": "own"}
OLD = {"a/inside": "old", "b.json": "old", "gone/inside": "old", "users": "own"}


def interrupted_after(calls, monkeypatch, run):
    """Stop a run at its n-th rename or removal, as a kill does; return whether it got there."""
    done = []

    def counted(own):
        def wrapper(*args, **options):
            done.append(own.__name__)
            if len(done) > calls:
                raise KeyboardInterrupt
            return own(*args, **options)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr("hf_forward_inf.utils.storage.shutil.rmtree", counted(shutil.rmtree))
        try:
            run()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("calls", range(12))
def test_an_interruption_at_any_point_leaves_one_run_whole(tmp_path, monkeypatch, calls):
    (tmp_path / "users").write_text("own")
    write_all(tmp_path, run_of("old", gone=folder_of("old")))
    assert contents(tmp_path) == OLD
    stopped = interrupted_after(calls, monkeypatch, lambda: write_all(tmp_path, run_of("new", gone=None)))
    begun = (tmp_path / ".complete").exists()
    monkeypatch.setattr("hf_forward_inf.utils.storage._is_alive", lambda _: False)  # as later, in another one
    clear.cache_clear()
    finish(tmp_path)
    assert contents(tmp_path) == (OLD if stopped and not begun and calls == 0 else NEW)
    assert stopped or calls > 8


def test_a_symbolic_link_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"b\.json is a symbolic link, which is not followed"):
        write_all(tmp_path / "out", run_of("new"))
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert names(tmp_path / "out") == ["b.json"]


def test_several_processes_may_write_the_same(tmp_path):
    code = """
import sys
from pathlib import Path
from hf_forward_inf.utils.storage import write_all

for _ in range(20):
    write_all(Path(sys.argv[1]), {"a": lambda path: (path.mkdir(), (path / "b").write_text("same"))})
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert contents(tmp_path) == {"a/b": "same"} and names(tmp_path) == ["a"]
