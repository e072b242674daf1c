import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peers
from peer_runs.task import IGNORED, Task, logits_of, losses, plain_batches, plain_pass
from peer_tasks import _causal_row, train_llama, write_task

from hf_forward_inf.adapters import Seq2SeqAdapter
from hf_forward_inf.data import proponents


@pytest.fixture
def task(model, tokenizer, queries, corpus, tmp_path):
    candidates = told_about(queries, corpus)
    folder = tmp_path / "task"
    write_task(folder, "seq2seq", (model, tokenizer), queries, candidates, proponents(queries, candidates))
    return folder


def told_about(queries, corpus):
    """Few candidates, some of each query's proponents among them."""
    rows = sorted({row for own in proponents(queries, corpus["abstracts"]) for row in own[:2]} | set(range(30)))
    return corpus["abstracts"].select(rows)


def options(tmp_path, *more):
    return peers.parse(["--envs", str(tmp_path / "envs"), *more])


def test_a_task_is_read_back_with_the_losses_that_the_adapter_gives(task, model, tokenizer, queries):
    read = Task(task)
    batch = read.collate(read.queries)
    with torch.no_grad():
        found = losses(logits_of(read.model, batch), batch["labels"])
        expected = model(
            **Seq2SeqAdapter(model, tokenizer).collate(Seq2SeqAdapter(model, tokenizer).encode(queries[:]))
        )
    assert found.sum() / (batch["labels"] != IGNORED).sum() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert len(plain_pass(read, plain_batches(read))) == len(read.candidates)


def test_padding_changes_no_loss(task):
    read = Task(task)
    alone = read.collate(read.queries[:1])
    padded = read.collate(read.queries[:1], like=read.candidates)
    assert padded["input_ids"].shape[1] > alone["input_ids"].shape[1]
    with torch.no_grad():
        one, other = (losses(logits_of(read.model, batch), batch["labels"]) for batch in (alone, padded))
    assert one.item() == pytest.approx(other.item(), abs=1e-4)


def test_a_causal_querys_loss_is_that_of_its_answer(tokenizer):
    row = {"inputs_pretokenized": "The capital of Peru is <extra_id_0>.", "targets_pretokenized": "<extra_id_0> Lima"}
    asked, told = _causal_row(tokenizer, row, True), _causal_row(tokenizer, row, False)
    answer = [label for label in asked["labels"] if label != IGNORED]
    assert tokenizer.decode(answer).strip().removesuffix(".") == "Lima"  # the full stop may share its token
    assert told["labels"] == told["input_ids"] == asked["input_ids"]


def test_a_causal_task_keeps_the_losses_of_the_model(tokenizer, candidates, tmp_path):
    rows = [_causal_row(tokenizer, row, False) for row in candidates]
    model = train_llama(rows, len(tokenizer), epochs=1)
    write_task(tmp_path, "causal", (model, tokenizer), candidates.select([0]), candidates, [[0]])
    read = Task(tmp_path)
    batch = read.collate(rows[:1])
    with torch.no_grad():
        found = losses(logits_of(read.model, batch), batch["labels"]).item()
        ids = torch.tensor([rows[0]["input_ids"]])
        assert found == pytest.approx(model(ids, labels=ids).loss.item() * (ids.numel() - 1), rel=1e-4)


def test_a_method_is_measured_in_a_process_of_its_own(task, tmp_path):
    truth = json.loads((task / "task.json").read_text())["proponents"]
    row = peers.measure("ours", "bm25", task, truth, options(tmp_path))
    assert 0 < row["mrr"] <= 1
    assert row["passes"] > 0
    assert row["memory"] > 0.5
    assert row["disk"] >= 0


@pytest.mark.parametrize(
    ("method", "more", "error"),
    [("no_such_method", [], "no_such_method"), ("bm25", ["--limit", "0.1"], "no result within")],
)
def test_a_method_that_fails_keeps_its_row_and_tells_why(task, tmp_path, method, more, error):
    row = peers.measure("ours", method, task, [[0]] * 3, options(tmp_path, *more))
    assert error in row["error"]
    assert error in peers.as_markdown({"ours/bm25": row})


def test_a_peer_that_cannot_be_installed_keeps_its_row(task, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("no room for it")

    monkeypatch.setattr(peers.venv, "create", refused)
    assert peers.measure("captum", "last_layer", task, [[0]] * 3, options(tmp_path)) == {"error": "no room for it"}


def test_one_query_alone_has_costs_and_no_mrr(monkeypatch, task, tmp_path):
    scores = np.full((3, 5), np.nan)
    scores[0] = 1.0
    figures = {"passes": 2.0, "memory": 1.0, "disk": 0}
    monkeypatch.setattr(peers, "run", lambda *_: (dict(figures), scores))
    row = peers.measure("ours", "forward_inf_one", task, [[0]] * 3, options(tmp_path))
    assert row == figures
    assert peers.as_markdown({"ours/forward_inf_one": row}).count("|") == 24


def test_a_table_shows_figures_and_errors_alike():
    row = {"mrr": 0.5, "mrr_se": 0.1, "recall@10": 0.25, "passes": 3.0, "memory": 1.5, "disk": 2e6}
    text = peers.as_markdown({"bergson/ekfac": {"error": "a|b"}, "ours/bm25": row})
    assert "| ours | BM25, no model | 0.500 (0.100) | 0.250 | 3.0 | 1.50 | 2.0 |" in text
    assert "| bergson | EK-FAC | a/b | | | | |" in text
