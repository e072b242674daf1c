"""The cache folder, and writing files and folders so that an interrupted run leaves no partial one."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from torch import Tensor


def default_cache_dir() -> Path:
    """Return the cache folder: `HF_FORWARD_INF_CACHE`, by default `hf_forward_inf` in the Hugging Face home."""
    return Path(os.environ.get("HF_FORWARD_INF_CACHE", Path(HF_HOME) / "hf_forward_inf"))


Tensors: TypeAlias = dict[str, Tensor]
"""Tensors by name."""


def cached_tensors(file: Path, compute: Callable[[], Tensors]) -> Tensors:
    """Return the tensors of a safetensors file; compute and write them if it does not exist.

    They are written to a temporary path and renamed: an interrupted run leaves no partial file.

    Args:
        file (`Path`): The file to read or write.
        compute (`Callable`): Returns the tensors by name.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
        os.close(handle)
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in compute().items()}, part)
            os.replace(part, file)
        finally:
            Path(part).unlink(missing_ok=True)
    return load_file(file)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder to a temporary path and rename it: an interrupted run leaves no partial folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        write(part)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
