"""States before the perturbed part of the model, stored candidate by candidate, so that later queries start there."""

import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SUM = 4
"""Bytes of a checksum."""


class StateStore:
    """States by row, `[positions, features]`, in one file, or in memory.

    Every row has its place in the file and a checksum: a row that was never written, or only in part, is not there.
    What is not written takes no space on the disk.

    Args:
        file (`Path`, *optional*): The file. Defaults to memory.
        lengths (`np.ndarray`): Number of positions of each row.
        like (`Tensor`): A tensor of the states' type, whose last axis is as long as theirs.
        limit (`float`): Bytes; no more are written.
    """

    def __init__(self, file: Path | None, lengths: np.ndarray, like: Tensor, limit: float):
        self.lengths, self.width, self.dtype, self.limit = lengths, like.shape[-1], like.dtype, limit
        sizes = SUM + lengths.astype(np.int64) * self.width * like.element_size()
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.memory: dict[int, Tensor] = {}
        self.written = 0
        self.path, self.file = file, None if file is None else _opened(file)
        if self.file is not None:
            self.written = os.fstat(self.file).st_blocks * 512  # of a sparse file, what it takes on the disk

    def __del__(self) -> None:
        file = getattr(self, "file", None)
        if file is not None:
            os.close(file)

    def _reopen(self) -> None:
        """Begin a new file where this one was deleted: what it holds was found to be out of date."""
        if self.file is not None and self.path is not None and not os.fstat(self.file).st_nlink:
            os.close(self.file)
            self.file, self.written = _opened(self.path), 0

    def read(self, row: int) -> Tensor | None:
        """Return a row's states, `None` where they are not stored."""
        self._reopen()
        if self.file is None:
            return self.memory.get(row)
        start, stop = int(self.starts[row]), int(self.starts[row + 1])
        found = bytearray(os.pread(self.file, stop - start, start))
        if len(found) < stop - start or int.from_bytes(found[:SUM], "little") != _sum(memoryview(found)[SUM:]):
            return None
        return torch.frombuffer(found, dtype=torch.uint8, offset=SUM).view(self.dtype).view(-1, self.width)

    def write(self, row: int, states: Tensor) -> None:
        """Store a row's states, `[positions or more, features]`, as far as the limit and the disk allow it."""
        self._reopen()
        size = int(self.starts[row + 1] - self.starts[row])
        if self.written + size > self.limit:
            return
        own = states[: self.lengths[row]].detach().cpu().contiguous()
        if self.file is None:
            self.memory[row] = own
        else:
            content = own.reshape(-1).view(torch.uint8).numpy().tobytes()
            try:
                os.pwrite(self.file, _sum(content).to_bytes(SUM, "little") + content, int(self.starts[row]))
            except OSError as error:
                self.limit = 0
                warnings.warn(f"States are no longer stored, and so computed for every query: {error}.", stacklevel=2)
        self.written += size


def _opened(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)


def padded(states: list[Tensor]) -> Tensor:
    """Return the states of some rows as one tensor, `[rows, longest, features]`, padded with zeros."""
    return pad_sequence(states, batch_first=True)


def _sum(content: bytes | memoryview) -> int:
    return zlib.crc32(content) or 1  # what was never written reads as zeros
