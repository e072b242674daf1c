from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_forward_inf import ForwardInf
from hf_forward_inf.passes.encoding import encode
from hf_forward_inf.passes.freshness import agree
from hf_forward_inf.passes.loss_pass import LossPass
from tests.helpers.line import LineAdapter, points

ROWS = points(*(((i, 1), 0.5 * i) for i in range(20)))


def test_losses_whose_code_has_changed_are_computed_again(line, monkeypatch):
    query = points(((3, 1), 0))
    before = ForwardInf(adapter=line).trace(query, ROWS).scores
    losses = LineAdapter.term_losses
    monkeypatch.setattr(LineAdapter, "term_losses", lambda self, forward, batch: 1.5 * losses(self, forward, batch))
    with pytest.warns(UserWarning, match="not what the model computes now"):
        scores = ForwardInf(adapter=LineAdapter(line.model)).trace(query, ROWS).scores
    # 1.5 times the loss: the direction of the step is the same.
    np.testing.assert_allclose(scores, 1.5 * before, rtol=1e-5)


def test_a_pass_that_is_as_it_was_is_not_computed_again(line, recwarn):
    expected = LossPass(line, ROWS).base()
    again = LineAdapter(line.model)
    for _ in range(2):
        np.testing.assert_array_equal(LossPass(again, ROWS).base(), expected)
    assert again.passes == 1  # a few rows are compared, once
    assert not recwarn.list


def test_rows_that_are_encoded_otherwise_now_are_encoded_again(line, monkeypatch):
    before = encode(line, ROWS, "candidates")["y"][:]
    own = LineAdapter.encode
    monkeypatch.setattr(LineAdapter, "encode", lambda self, rows: {**own(self, rows), "y": [y + 1 for y in rows["y"]]})
    with pytest.warns(UserWarning, match="ncoding candidates: .* encoded again"):
        now = encode(LineAdapter(line.model), ROWS, "candidates")["y"][:]
    assert now == [y + 1 for y in before]


class Files(LineAdapter):
    """Reads x from a file."""

    columns = ("file", "y")

    def encode(self, rows):
        read = [list(map(float, Path(path).read_text().split())) for path in rows["file"]]
        return super().encode({"x": read, "y": rows["y"]})


def test_a_file_with_other_content_is_read_again(line, tmp_path, recwarn):
    files = [tmp_path / f"{i}.txt" for i in range(50)]
    for i, file in enumerate(files):
        file.write_text(f"{i} 1")
    adapter = Files(line.model)
    rows = Dataset.from_dict({"file": list(map(str, files)), "y": [0.0] * 50})
    before = LossPass(adapter, rows).base()
    files[17].write_text("9 10")
    after = LossPass(adapter, rows).base()
    assert np.flatnonzero(after != before).tolist() == [17]
    assert not recwarn.list  # another key, not a lucky draw


def test_differences_of_batches_are_no_changes():
    losses = np.array([[3.0], [1e-6], [np.nan], [np.inf]])
    assert agree(losses, losses * (1 + 1e-5), 2e-3)
    assert agree(losses, losses + 1e-5, 2e-3)
    assert not agree(losses, losses * 1.01, 2e-3)
    assert not agree(losses, np.where(np.isnan(losses), 0, losses), 2e-3)
