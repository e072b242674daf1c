import os
import shutil

import numpy as np
import pytest
import torch

from hf_forward_inf.passes.state_store import StateStore, padded

LENGTHS = np.array([3, 1, 2])


def states(row, dtype=torch.bfloat16):
    return torch.arange(LENGTHS[row] * 4, dtype=dtype).view(-1, 4) + row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [True, False])
def test_states_come_back_bit_for_bit_also_from_another_process(tmp_path, dtype, on_disk):
    file = tmp_path / "states.bin" if on_disk else None
    store = StateStore(file, LENGTHS, torch.empty(1, 4, dtype=dtype), 1e6)
    for row in (2, 0):
        store.write(row, torch.cat([states(row, dtype), torch.full((2, 4), torch.nan, dtype=dtype)]))  # and padding
    for again in (store, *([StateStore(file, LENGTHS, torch.empty(1, 4, dtype=dtype), 1e6)] if on_disk else [])):
        assert again.read(1) is None
        for row in (0, 2):
            assert torch.equal(again.read(row), states(row, dtype))
        together = padded([again.read(0), again.read(2)])
        assert together.shape == (2, 3, 4) and together[1, 2].abs().sum() == 0


def test_a_row_that_was_written_in_part_is_not_there(tmp_path):
    store = StateStore(tmp_path / "states.bin", LENGTHS, states(0), 1e6)
    store.write(0, states(0))
    store.write(2, states(2))
    with open(tmp_path / "states.bin", "r+b") as file:
        file.seek(store.starts[0] + 9)
        file.write(b"!")
    os.truncate(tmp_path / "states.bin", store.starts[3] - 1)
    assert store.read(0) is None and store.read(2) is None


def test_a_file_that_was_deleted_because_it_is_out_of_date_is_not_read_on(tmp_path):
    store = StateStore(tmp_path / "folder" / "states.bin", LENGTHS, states(0), 1e6)
    store.write(0, states(0))
    shutil.rmtree(tmp_path / "folder")
    assert store.read(0) is None
    store.write(1, states(1))
    assert torch.equal(store.read(1), states(1)) and (tmp_path / "folder" / "states.bin").exists()


def test_no_more_is_stored_than_the_limit_allows_and_a_full_disk_is_no_error(tmp_path, monkeypatch):
    store = StateStore(None, LENGTHS, states(0), 3 * 8 + 4)
    store.write(0, states(0))
    store.write(1, states(1))
    assert store.read(0) is not None and store.read(1) is None

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    store = StateStore(tmp_path / "states.bin", LENGTHS, states(0), 1e6)
    with pytest.warns(UserWarning, match="no longer stored.*No space left"):
        store.write(0, states(0))
    store.write(1, states(1))  # says nothing more
    assert store.read(0) is None
