import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peer_environments
import peer_tables
import peer_tasks
from peer_measures import Measured
from peer_methods import Method
from peer_runs.task import IGNORED, Task, logits_of, losses, plain_batches, plain_pass
from peer_tasks import Saving, Training, Truth, _causal_row, after_each_step, write_task

from hf_forward_inf.adapters import Seq2SeqAdapter
from hf_forward_inf.data import proponents
from hf_forward_inf.scores.metrics import lds

SIZES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
BM25 = Method("ours", "bm25", "BM25")


@pytest.fixture
def task(model, tokenizer, queries, corpus, tmp_path):
    candidates = told_about(queries, corpus)
    folder = tmp_path / "task"
    write_task(folder, "seq2seq", (model, tokenizer), queries, candidates, known=proponents(queries, candidates))
    return folder


@pytest.fixture
def measured(tmp_path):
    """A task with a truth, and measurements of which none has been made: 2 judged queries, 2 to choose by."""
    folder = tmp_path / "truth"
    folder.mkdir()
    draw = np.random.default_rng(0)
    truth = Truth(draw.random((12, 5)) < 0.5, draw.random((12, 4)), 2)
    np.savez(folder / "truth.npz", subsets=truth.subsets, losses=truth.losses)
    (folder / "task.json").write_text(json.dumps({"kind": "causal", "judged": 2, "proponents": [[0], [1, 4]]}))
    (folder / "queries.json").write_text(json.dumps([{}] * 222))
    (folder / "candidates.json").write_text(json.dumps([{}] * 5))
    return Measured(folder, tmp_path / "measured", tmp_path / "envs", 60)


def told_about(queries, corpus):
    """Few candidates, some of each query's proponents among them."""
    rows = sorted({row for own in proponents(queries, corpus["abstracts"]) for row in own[:2]} | set(range(30)))
    return corpus["abstracts"].select(rows)


def stored(measured, method, run, scores, **figures):
    folder = measured.folder / method.key / run
    folder.mkdir(parents=True)
    np.save(folder / "scores.npy", np.asarray(scores, dtype=np.float32))
    costs = {"passes": 2.0, "memory": 1.5, "disk": 3e6, "plain_seconds": 0.1, **figures}
    (folder / "figures.json").write_text(json.dumps(costs))


def predicted(measured, choosing):
    """Scores that predict the truth as well as scores can, which are linear in the subsets."""
    subsets, losses = measured.truth(choosing)
    return -np.linalg.lstsq(subsets - subsets.mean(0), losses - losses.mean(0), rcond=None)[0].T


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
    read = Task(task, slice(0, 1))
    alone = read.collate(read.queries)
    padded = read.collate(read.queries, like=read.candidates)
    assert padded["input_ids"].shape[1] > alone["input_ids"].shape[1]
    with torch.no_grad():
        one, other = (losses(logits_of(read.model, batch), batch["labels"]) for batch in (alone, padded))
    assert one.item() == pytest.approx(other.item(), abs=1e-4)


def test_a_causal_querys_loss_is_that_of_its_answer_or_of_a_whole_text(tokenizer):
    row = {"inputs_pretokenized": "The capital of Peru is <extra_id_0>.", "targets_pretokenized": "<extra_id_0> Lima"}
    asked, told = _causal_row(tokenizer, row, True), _causal_row(tokenizer, row, False)
    answer = [label for label in asked["labels"] if label != IGNORED]
    assert tokenizer.decode(answer).strip().removesuffix(".") == "Lima"  # the full stop may share its token
    assert told["labels"] == told["input_ids"] == asked["input_ids"]
    text = _causal_row(tokenizer, {"text": "The capital of Peru is Lima."}, True)
    assert text["row"] == told["row"]
    assert text["labels"] == told["labels"]


def test_models_on_the_way_are_those_of_the_training(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(peer_tasks, "TRAINING", {"epochs": 6, "learning_rate": 1e-2, "batch_length": 64})
    monkeypatch.setattr(peer_tasks, "CHECKPOINTS", 3)
    rows = Dataset.from_dict({"text": ["Lima is in Peru.", "Paris is in France.", "Rome is in Italy."]})

    def train():
        model = peer_tasks.train_llama(rows, tokenizer, seed=0, sizes=SIZES, quiet=True, **peer_tasks.TRAINING)
        return peer_tasks.CausalLMAdapter(model.eval(), tokenizer)

    model, _, training = peer_tasks.trained_again(train, rows, rows, tmp_path)
    assert len(training.steps) == len(training.rates) == 3
    state = torch.load(tmp_path / "2" / "optimizer.pt")
    assert sum(training.steps) == state["state"][0]["step"]
    read = type(model).from_pretrained(tmp_path / "2")
    for one, other in zip(read.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(type(model).from_pretrained(tmp_path / "0").lm_head.weight, model.lm_head.weight)


def test_rates_between_saved_models_are_means(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_tasks, "CHECKPOINTS", 2)
    layer = torch.nn.Linear(1, 1)
    layer.save_pretrained = lambda folder: folder.mkdir(parents=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    training = Training(tmp_path)
    with after_each_step(Saving(training, layer, 4)):
        for rate in (1.0, 2.0, 3.0, 5.0):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    optimizer.step()  # outside of the block
    assert training.steps == [2, 2]
    assert training.rates == [1.5, 4.0]


def test_a_method_is_measured_in_a_process_of_its_own_and_one_that_fails_tells_why(task, tmp_path, monkeypatch):
    measured = Measured(task, tmp_path / "measured", tmp_path / "envs", 60)
    wrong = Method("ours", "no_such_method", "?")
    monkeypatch.setattr(peer_tables, "METHODS", (BM25, wrong))
    measured.measure("ours", [BM25, wrong], costs=False)
    scores, figures = measured.scores(BM25, "default"), measured.figures(BM25, "default")
    assert scores.shape == (len(Task(task).queries), len(Task(task).candidates))
    assert figures["passes"] > 0
    assert figures["memory"] > 0.5
    assert "no_such_method" in measured.error(wrong, "default")
    text = peer_tables.tables(measured)
    assert "no_such_method" in text
    assert "MRR" in text


def test_a_peer_that_cannot_be_installed_keeps_its_row(task, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("no room for it")

    monkeypatch.setattr(peer_environments.venv, "create", refused)
    measured = Measured(task, tmp_path / "measured", tmp_path / "envs", 60)
    method = Method("captum", "last_layer", "last layer")
    measured.measure("captum", [method], costs=False)
    assert measured.error(method, "default") == "no room for it"


def test_settings_are_chosen_by_the_queries_that_are_not_judged(measured):
    method = Method("ours", "bm25", "BM25", grid={"damping": (1.0, 0.1, 0.01)})
    best, worst = predicted(measured, choosing=True), -predicted(measured, choosing=True)
    stored(measured, method, "tried-0", worst)
    stored(measured, method, "tried-1", best)
    stored(measured, method, "tried-2", np.full((2, 5), np.nan))
    assert measured.choice(method) == {"damping": 0.1}


def test_costs_are_those_of_other_queries_where_something_is_stored(measured):
    runs = {run.name.partition("/")[2]: run for run in measured._costs(BM25)}
    assert runs["cold-1"].store == runs["warm-1"].store == runs["warm-10"].store == runs["warm-100"].store
    assert len({runs[name].store for name in ("cold-1", "cold-10", "cold-100")}) == 3
    asked = [set(range(*runs[name].queries)) for name in ("cold-1", "warm-1", "warm-10", "warm-100")]
    assert [len(one) for one in asked] == [1, 1, 10, 100]
    assert len(set.union(*asked)) == 112


def test_a_table_shows_scores_differences_costs_and_errors(measured, monkeypatch):
    first, second, third = (
        BM25,
        Method("bergson", "ekfac", "EK-FAC", grid={"damping": (1.0, 0.1)}),
        Method("x", "y", "?"),
    )
    monkeypatch.setattr(peer_tables, "METHODS", (first, second, third))
    good, bad = predicted(measured, choosing=False), np.zeros((2, 5))
    stored(measured, first, "default", good)
    stored(measured, first, "cold-1", good[:1], passes=7.0)
    stored(measured, second, "default", bad)
    stored(measured, second, "tried-0", bad)
    stored(measured, second, "tried-1", np.full((2, 5), np.nan))
    stored(measured, second, "chosen", bad)
    broken = measured.folder / third.key / "default"
    broken.mkdir(parents=True)
    (broken / "error.txt").write_text("a|b")
    text = peer_tables.tables(measured)
    rows = json.loads((measured.folder / "figures_scores.json").read_text())["rows"]
    assert rows["BM25"]["lds"] == pytest.approx(lds(good, *measured.truth(choosing=False))["lds"])
    assert rows["bergson: EK-FAC"]["lds"] == 0
    assert rows["bergson: EK-FAC"]["ahead"] == pytest.approx(rows["BM25"]["lds"])
    assert "damping 1" in text
    assert "a/b" in text
    costs = json.loads((measured.folder / "figures_costs.json").read_text())["rows"]
    assert costs == {"BM25": {"cold-1": 7.0, "memory": 1.5, "disk": 3.0}}
