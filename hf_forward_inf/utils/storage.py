"""The cache folder, and writing files and folders so that an interrupted run leaves no partial one."""

import errno
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_forward_inf.utils.cache import mark_used

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".writing-"
"""Begins the names of temporary folders; after it, the machine and the process that writes."""
COMPLETE = ".complete"
"""A folder of what is complete and only has to be put in its place."""
REMOVED = ".removed-"
"""Begins the names in that folder of what is to be removed."""
OLD = ".old-"
"""Begins the names in that folder of what was replaced."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, a quota that is used up, and a limit of files' sizes."""


def default_cache_dir() -> Path:
    """Return the cache folder: `HF_FORWARD_INF_CACHE`, by default `hf_forward_inf` in the Hugging Face home."""
    return Path(os.environ.get("HF_FORWARD_INF_CACHE", Path(HF_HOME) / "hf_forward_inf"))


Tensors: TypeAlias = dict[str, Tensor]
"""Tensors by name."""


def cached_tensors(file: Path, compute: Callable[[], Tensors]) -> Tensors:
    """Return the tensors of a safetensors file; compute and write them if it does not exist.

    Args:
        file (`Path`): The file to read or write.
        compute (`Callable`): Returns the tensors by name.
    """
    cache_tensors(file, compute)
    return load_file(file)


def cache_tensors(file: Path, compute: Callable[[], Tensors]) -> None:
    """Write the tensors of a safetensors file unless it exists; arguments as in [`cached_tensors`]."""
    if not file.exists():
        tensors = {name: tensor.contiguous().cpu() for name, tensor in compute().items()}
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with written(file, needed) as part:
            save_file(tensors, part)
    mark_used(file)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for: they take memory only while they are used.

    Args:
        file (`Path`): The file.
        device (`torch.device`): Where they are read to.
    """

    def __init__(self, file: Path, device: torch.device):
        self.file, self.device = file, device
        with safe_open(file, "pt") as stored:
            self.names = list(stored.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.file, "pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor.to(self.device)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with written(file, len(data)) as part:
        part.write_bytes(data)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder to a temporary path and rename it: an interrupted run leaves no partial folder.

    A folder that another process has put there meanwhile stays: its name says what it holds.
    """
    try:
        with written(folder) as part:
            part.mkdir()
            write(part)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not folder.exists():
            raise


def write_all(folder: Path, writers: Mapping[str, Callable[[Path], object] | None]) -> None:
    """Write several files and folders, and put them in place together, when all are complete.

    What is complete is moved to [`COMPLETE`] at once, and from there to its place. If that is interrupted,
    [`finish`] goes on with it: no state is half of one run and half of another.

    Args:
        folder (`Path`): Where they are to be; what else is there stays.
        writers (`dict`): Functions that write a file or folder, by its name; `None` for one that is removed.

    Raises:
        FileExistsError: If one of the names is a symbolic link, which might lead anywhere.
        OSError: If there is no room on the disk; then nothing has changed.
    """
    linked = next((folder / name for name in writers if (folder / name).is_symlink()), None)
    if linked is not None:
        raise FileExistsError(
            f"{linked} is a symbolic link, which is not followed: remove it, or give another folder."
        )
    with temporary_folder(folder) as staging, _full_disk_named(folder, staging):
        run = staging / "run"
        run.mkdir()
        for name, write in writers.items():
            if write is None:
                (run / f"{REMOVED}{name}").touch()
            else:
                write(run / name)
        with alone_in(folder):
            _put_in_place(folder)
            os.replace(run, folder / COMPLETE)
            _put_in_place(folder)


def finish(folder: Path) -> None:
    """Put in place what an interrupted [`write_all`] has completed, if there is any, and delete what else it left."""
    clear(folder)
    if (folder / COMPLETE).is_dir():
        with alone_in(folder):
            _put_in_place(folder)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process puts anything in place in a folder, or reads it: all of a run may save the same."""
    opened = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl and opened is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        if opened is not None:
            os.close(opened)


def _put_in_place(folder: Path) -> None:
    complete = folder / COMPLETE
    if not complete.is_dir():
        return
    for part in sorted(complete.iterdir()):
        if part.name.startswith(OLD):
            continue
        removed = part.name.startswith(REMOVED)
        target = folder / part.name.removeprefix(REMOVED)
        if target.is_dir():
            old = complete / f"{OLD}{target.name}"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        if not removed:
            os.replace(part, target)
        else:
            target.unlink(missing_ok=True)
    shutil.rmtree(complete)


@contextmanager
def written(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Give a temporary path to write a file or folder to, which then takes its place at once.

    Args:
        path (`Path`): Where the file or folder is to be. A folder must not hold anything.
        needed (`int`, *optional*): Bytes that it needs, where that is known, for the message.

    Raises:
        OSError: If there is no room on the disk; nothing is left of what was written.
    """
    with temporary_folder(path.parent) as folder, _full_disk_named(path, folder, needed):
        part = folder / path.name
        yield part
        os.replace(part, path)


@contextmanager
def _full_disk_named(path: Path, folder: Path, needed: int | None = None) -> Iterator[None]:
    """Name the path and the space it needs where writing to a temporary folder fails for want of room."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        size = f"{needed:,}" if needed is not None else f"more than {_size(folder):,}"
        raise OSError(
            f"There is no room for {path}: it needs {size} bytes, and {shutil.disk_usage(folder.parent).free:,} are "
            "free. Make room, or choose another folder (for the cache, HF_FORWARD_INF_CACHE or cache_dir=...)."
        ) from error


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Create a folder in another, and delete it at the end; those that killed processes left there are deleted too."""
    parent.mkdir(parents=True, exist_ok=True)
    clear(parent)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{TEMPORARY}{machine()}-{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@lru_cache(maxsize=1024)
def clear(parent: Path) -> None:
    """Delete temporary folders whose process is no longer alive; once a run for each folder."""
    for folder in parent.glob(f"{TEMPORARY}{machine()}-*"):
        process = folder.name.removeprefix(f"{TEMPORARY}{machine()}-").partition("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    """Whether a process runs; one that was killed and that its parent has not asked about does not."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@lru_cache(maxsize=1)
def machine() -> str:
    """Return a name of this machine, or container: process numbers mean something only there."""
    space = Path("/proc/self/ns/pid")  # containers of equal names have other spaces of process numbers
    return f"{platform.node()}-{os.stat(space).st_ino}" if space.exists() else platform.node()


def _is_full(error: Exception) -> bool:
    # Rust's and Arrow's errors only say it.
    return getattr(error, "errno", None) in NO_ROOM or any(f"os error {code}" in str(error) for code in NO_ROOM)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
