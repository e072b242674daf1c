from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import disable_caching, enable_caching

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import Seq2SeqAdapter
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.passes import candidate_pass
from hf_forward_inf.passes.candidate_pass import batches
from hf_forward_inf.passes.loss_pass import LossPass
from tests.helpers.line import points


@pytest.mark.parametrize("max_batch_length", [1, 60, 100_000])
def test_the_batch_size_changes_no_loss(model, tokenizer, candidates, max_batch_length):
    adapter = Seq2SeqAdapter(model, tokenizer)
    expected = LossPass(adapter, candidates).base()
    disable_caching()
    try:
        losses = LossPass(adapter, candidates, max_batch_length=max_batch_length).base()
    finally:
        enable_caching()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_batches_cover_all_rows_within_the_limit():
    lengths = np.array([[9, 3], [5, 5], [5, 1], [2, 2], [2, 1], [1, 1]])
    cuts = list(batches(lengths, 20))
    assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(6))
    for cut in cuts:
        part = lengths[cut]
        assert len(part) == 1 or len(part) * part.max(axis=0).sum() <= 20


def test_sorting_wastes_little_on_padding(model, tokenizer, corpus):
    loss = LossPass(Seq2SeqAdapter(model, tokenizer), corpus["abstracts"])
    lengths = loss.adapter.lengths(loss.encoded[:])
    cuts = list(batches(lengths, 4096))
    padded = sum((cut.stop - cut.start) * lengths[cut].max(axis=0) for cut in cuts)
    targets, inputs = padded / lengths.sum(axis=0)
    assert targets < 1.05  # these run once a query
    assert inputs < 1.5  # these once a block of queries


def test_other_weights_settings_or_candidates_are_not_taken_from_the_cache(line):
    query, rows = points(((3, 1), 0)), points(((1, 0), 0), ((0, 1), 0))
    first = ForwardInf(adapter=line).trace(query, rows).scores
    other = ForwardInf(adapter=line, ascent=AscentConfig(radius=2.0)).trace(query, rows).scores
    assert not np.allclose(first, other)
    with torch.no_grad():
        line.model.w += 1
    assert not np.allclose(ForwardInf(adapter=line).trace(query, rows).scores, first)


def test_batches_are_halved_when_memory_runs_out(model, tokenizer, queries, candidates, monkeypatch, tmp_path):
    expected = ForwardInf(model, tokenizer).trace(queries, candidates).scores
    losses = Seq2SeqAdapter.term_losses

    def with_little_memory(self, forward, batch):
        if len(batch["labels"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return losses(self, forward, batch)

    monkeypatch.setattr(Seq2SeqAdapter, "term_losses", with_little_memory)
    tracer = ForwardInf(model, tokenizer, cache_dir=tmp_path / "other")
    np.testing.assert_allclose(tracer.trace(queries, candidates).scores, expected, atol=2e-4)


def test_an_interrupted_run_resumes_where_it_stopped(line, monkeypatch, tmp_path):
    queries, rows = points(((3, 1), 0), ((1, 2), 0), ((2, 2), 1)), points(((1, 0), 0), ((0, 1), 0))
    monkeypatch.setattr(Perturber, "_block_size", lambda self, tokens: 1)
    tracer = ForwardInf(adapter=line)
    losses = type(line).term_losses

    def interrupted(self, forward, batch):
        if self.passes == 5:
            raise KeyboardInterrupt
        return losses(self, forward, batch)

    monkeypatch.setattr(type(line), "term_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracer.trace(queries, rows)
    monkeypatch.setattr(type(line), "term_losses", losses)
    resumed = tracer.trace(queries, rows).scores
    assert line.passes == 5 + 2  # only the third query was left: its ascent and its pass
    np.testing.assert_array_equal(
        resumed, ForwardInf(adapter=line, cache_dir=tmp_path / "other").trace(queries, rows).scores
    )


def test_nothing_is_cached_when_datasets_caching_is_off(line, cache):
    disable_caching()
    try:
        ForwardInf(adapter=line).trace(points(((3, 1), 0)), points(((1, 0), 0)))
    finally:
        enable_caching()
    assert not list(cache.rglob("*.*"))


def in_processes(monkeypatch, count, run):
    """Run each of several processes in turn, and return what they have of the rows, added up as [`_gathered`] does."""
    found, sent = [], []
    with monkeypatch.context() as patch:
        patch.setattr(LossPass, "_gathered", lambda self, values: found.append(values.copy()) or values)
        patch.setattr(candidate_pass, "broadcast_object_list", lambda mask: sent or sent.append(mask[0]) or sent)
        for process in range(count):
            state = SimpleNamespace(
                process_index=process, num_processes=count, is_main_process=not process, main_process_first=nullcontext
            )
            patch.setattr(candidate_pass, "process_state", lambda state=state: state)
            run()
    return sum(found)[:, 0]


def test_another_cut_and_another_number_of_processes_reuse_stored_rows(line, monkeypatch, tmp_path):
    rows = points(*(((i, 1), 0.5 * i) for i in range(23)))
    expected = LossPass(line, rows, cache_dir=tmp_path / "one").base()

    def base(length):
        return LossPass(line, rows, cache_dir=tmp_path / "two", max_batch_length=length).base()

    np.testing.assert_array_equal(in_processes(monkeypatch, 2, lambda: base(5)), expected)
    computed = line.passes
    np.testing.assert_array_equal(in_processes(monkeypatch, 3, lambda: base(3)), expected)
    np.testing.assert_array_equal(base(4096), expected)
    assert line.passes == computed


def test_an_interrupted_pass_goes_on_where_it_stopped_with_any_batch_size(line, monkeypatch, tmp_path):
    rows = points(*(((i, 1), 0.5 * i) for i in range(20)))
    expected = LossPass(line, rows, cache_dir=tmp_path / "other").base()
    losses, seen = type(line).term_losses, []

    def interrupted(self, forward, batch):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(batch["x"]))
        return losses(self, forward, batch)

    monkeypatch.setattr(type(line), "term_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LossPass(line, rows, cache_dir=tmp_path, max_batch_length=4).base()
    assert seen == [4, 4, 4]
    seen.clear()
    seen.append("the limit is behind")
    monkeypatch.setattr(
        type(line), "term_losses", lambda self, f, batch: seen.append(len(batch["x"])) or losses(self, f, batch)
    )
    np.testing.assert_array_equal(LossPass(line, rows, cache_dir=tmp_path, max_batch_length=7).base(), expected)
    assert seen[1:] == [2, 6]  # of the batches of 7, rows 12 and 13, then the rest


def test_a_file_of_rows_that_is_cut_off_is_computed_again(line, tmp_path):
    rows = points(*(((i, 1), 0.5 * i) for i in range(9)))
    expected = LossPass(line, rows, cache_dir=tmp_path).base()
    (file,) = (tmp_path / "passes").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="can't be read .*: its rows are computed again"):
        np.testing.assert_array_equal(LossPass(line, rows, cache_dir=tmp_path).base(), expected)
