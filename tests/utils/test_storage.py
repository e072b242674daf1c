import os
import resource
import subprocess
import sys

import pytest
import torch

from hf_forward_inf.utils.storage import cached_tensors, machine, temporary_folder, write_folder, written


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


@pytest.fixture
def little_room():
    """Let no file grow beyond 4096 bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_with_the_path_and_the_space_and_leaves_nothing(tmp_path, little_room):
    with pytest.raises(OSError, match=r"no room for .*big\.safetensors: it needs 40,000 bytes, and [\d,]+ are free"):
        cached_tensors(tmp_path / "big.safetensors", lambda: {"w": torch.zeros(10_000)})
    with pytest.raises(OSError, match=r"no room for .*folder: it needs more than [\d,]+ bytes"):
        write_folder(tmp_path / "folder", lambda part: (part / "file").write_bytes(bytes(5000)))
    assert names(tmp_path) == []
