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
    monkeypatch.setattr(Perturber, "block_size", 1)
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
    assert not list(cache.rglob("*.arrow"))


def test_shares_of_several_processes_are_cached_by_how_the_rows_are_cut(line, monkeypatch, tmp_path):
    rows = points(*(((i, 1), 0.5 * i) for i in range(23)))
    expected = LossPass(line, rows, cache_dir=tmp_path / "one").base()

    def of_two_processes(max_batch_length):
        """Run both processes, one after the other, and gather what they have."""
        found, passes, values = np.full(len(rows), np.nan), [], []
        for process in range(2):
            state = SimpleNamespace(
                process_index=process, num_processes=2, is_main_process=True, main_process_first=nullcontext
            )
            monkeypatch.setattr(candidate_pass, "process_state", lambda state=state: state)
            monkeypatch.setattr(LossPass, "_gather", lambda self, local: values.append(local) or _padded(self, local))
            passes.append(LossPass(line, rows, cache_dir=tmp_path / "two", max_batch_length=max_batch_length))
            passes[-1].base()
        for process, (run, local) in enumerate(zip(passes, values, strict=True)):
            found[np.concatenate([run.order[cut] for cut in run.shares[process]])] = local[:, 0]
        return found

    for length in (5, 3, 5):
        np.testing.assert_array_equal(of_two_processes(length), expected)


def _padded(run, local):
    longest = max(sum(cut.stop - cut.start for cut in share) for share in run.shares)
    padded = np.full((2, longest, 1), np.nan, dtype=np.float32)
    padded[run.state.process_index, : len(local)] = local
    return padded
