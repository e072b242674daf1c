"""Values of a pass on disk, row by row: what was computed once is reused, however rows are batched or distributed."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from hf_forward_inf.utils.cache import mark_used
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.storage import write_bytes

SECONDS = 10.0
"""Time after which finished rows of a pass under way are written: the most that an interrupted run computes again."""

AddRows = Callable[[np.ndarray, np.ndarray], None]
"""Takes row numbers `[rows]` and their values `[rows, columns]`."""


class RowStore:
    """Values of numbered rows, float32 `[rows, columns]`, in a folder of safetensors files of some rows each.

    A file names its rows, so files of several runs, with other batches or another number of processes, go together.

    Args:
        folder (`Path`, *optional*): The files' folder; by default nothing is stored.
        rows (`int`): Number of all rows.
        columns (`int`): Number of values for each row.
    """

    def __init__(self, folder: Path | None, rows: int, columns: int):
        self.folder, self.shape = folder, (rows, columns)

    def nothing(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what [`load`] returns where nothing is stored."""
        return np.zeros(self.shape, dtype=np.float32), np.zeros(self.shape[0], dtype=bool)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the values `[rows, columns]`, 0 where unknown, and whether each row is stored, `[rows]`."""
        values, stored = self.nothing()
        for file in [] if self.folder is None else sorted(self.folder.glob("*.safetensors")):
            mark_used(file)
            try:
                part = load_file(file)
                values[part["rows"]] = part["values"]
            except (SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
                warnings.warn(f"{file} can't be read ({error}): its rows are computed again.", stacklevel=2)
                continue
            stored[part["rows"]] = True
        return values, stored

    def is_complete(self) -> bool:
        """Return whether all rows are stored."""
        stored = np.zeros(self.shape[0], dtype=bool)
        for file in [] if self.folder is None else self.folder.glob("*.safetensors"):
            with suppress(SafetensorError, OSError, IndexError), safe_open(file, "numpy") as content:
                stored[content.get_tensor("rows")] = True
        return bool(stored.all())

    @contextmanager
    def writing(self) -> Iterator[AddRows]:
        """Give a function that adds rows. They are written every [`SECONDS`], and at the end, also of a failed run."""
        pending: list[tuple[np.ndarray, np.ndarray]] = []
        started = time.monotonic()

        def add(rows: np.ndarray, values: np.ndarray) -> None:
            nonlocal started
            pending.append((rows, values))
            if time.monotonic() - started > SECONDS:
                self._write(pending)
                pending.clear()
                started = time.monotonic()

        try:
            yield add
        finally:
            self._write(pending)

    def _write(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
        if self.folder is None or not parts:
            return
        rows, values = (np.concatenate(part) for part in zip(*parts, strict=True))
        data = save({"rows": rows.astype(np.int64), "values": values})
        write_bytes(self.folder / f"{fingerprint(rows.tobytes())}.safetensors", data)
