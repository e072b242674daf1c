"""Files that are computed once: where they are kept, and how they are written."""

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
    """Where passes are kept: `HF_FORWARD_INF_CACHE`, or `hf_forward_inf` in the Hugging Face home."""
    return Path(os.environ.get("HF_FORWARD_INF_CACHE", Path(HF_HOME) / "hf_forward_inf"))


Tensors: TypeAlias = dict[str, Tensor]
"""Tensors by name, as safetensors keeps them."""


def kept(file: Path, make: Callable[[], Tensors]) -> Tensors:
    """Read tensors from a file, or make them and keep them there.

    They are written beside it first, and then put in place: no moment leaves half a file.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
        os.close(handle)
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in make().items()}, part)
            os.replace(part, file)
        finally:
            Path(part).unlink(missing_ok=True)
    return load_file(file)


def keep_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let a folder be written beside its place first, and then put it there: no moment leaves half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        write(part)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
