import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peer_environments
import peer_tables
import peer_truths
from experiments.retrainable_facts import retrainable
from peer_measures import Measured
from peer_methods import Method
from peer_runs.task import IGNORED, Task, logits_of, losses, plain_batches, plain_pass
from peer_tasks import Training, _causal_row, write_task
from peer_truths import Saving, after_each_step

from hf_forward_inf.adapters import CausalLMAdapter, Seq2SeqAdapter
from hf_forward_inf.data import proponents
from hf_forward_inf.scores.retraining import Retrained, lds
from hf_forward_inf.toys.tiny_models import train_llama

SIZES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
BM25 = Method("ours", "bm25", "BM25")
TRUTHS = ["halves", "hundredths"]


@pytest.fixture
def task(model, tokenizer, queries, corpus, tmp_path):
    candidates = told_about(queries, corpus)
    folder = tmp_path / "task"
    write_task(folder, "seq2seq", (model, tokenizer), queries, candidates, known=proponents(queries, candidates))
    return folder


@pytest.fixture
def measured(tmp_path):
    """A task with truths, and measurements of which none has been made: 2 judged queries, 2 to choose by."""
    folder = tmp_path / "truth"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in TRUTHS:
        np.savez(folder / f"truth_{name}.npz", subsets=draw.random((12, 5)) < 0.5, losses=draw.random((12, 4)))
    facts = {"kind": "causal", "judged": 2, "truths": TRUTHS, "proponents": [[0], [1, 4]]}
    (folder / "task.json").write_text(json.dumps(facts))
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


def predicted(measured, choosing, truth="halves"):
    """Scores that predict the truth as well as scores can, which are linear in the subsets."""
    subsets, losses = measured.truth(truth, choosing)
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


def test_a_blocks_tokens_are_scored_as_they_are(tokenizer):
    ids = tokenizer("The capital of Peru is Lima.")["input_ids"][2:5]
    row = _causal_row(tokenizer, {"text": "pital of", "input_ids": ids}, False)
    assert row == {"row": {"input_ids": ids}, "input_ids": ids, "labels": ids}


def test_a_recipes_task_has_its_truths_and_the_models_of_its_training(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(peer_truths, "CHECKPOINTS", 3)
    rows = Dataset.from_dict({"text": ["Lima is in Peru.", "Paris is in France.", "Rome is in Italy."]})

    def adapter(seed):
        model = train_llama(rows, tokenizer, 6, 1e-2, seed, sizes=SIZES, batch_length=64, quiet=True)
        return CausalLMAdapter(model.eval(), tokenizer)

    task = retrainable("three sentences", rows, rows.select([0, 1]), adapter, ("text", "text"))
    draw = np.random.default_rng(0)
    halves = [Retrained(one, draw.random((4, 3)) < 0.5, draw.random((4, 1))) for one in (task.queries, task.others)]
    peer_truths.write_truths(tmp_path, task, {"halves": halves}, lambda: task.adapter(0).model)

    read, truth = Task(tmp_path), np.load(tmp_path / "truth_halves.npz")
    assert read.facts["judged"] == 1
    assert np.array_equal(truth["subsets"], halves[0].subsets)
    assert np.array_equal(truth["losses"], np.concatenate([halves[0].losses, halves[1].losses], axis=1))
    steps, folder = read.facts["checkpoints"]["steps"], tmp_path / "checkpoints"
    assert len(steps) == len(read.facts["checkpoints"]["rates"]) == 3
    assert sum(steps) == torch.load(folder / "2" / "optimizer.pt")["state"][0]["step"]
    first, last = (type(read.model).from_pretrained(folder / name) for name in "02")
    for one, other in zip(last.parameters(), adapter(0).model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.lm_head.weight, read.model.lm_head.weight)


def test_models_on_the_way_to_another_model_are_refused(tokenizer, tmp_path):
    rows, seeds = Dataset.from_dict({"text": ["Lima is in Peru."]}), iter((0, 1))
    with pytest.raises(ValueError, match="not repeated"):
        peer_truths.trained_again(
            lambda: train_llama(rows, tokenizer, 2, 1e-2, next(seeds), sizes=SIZES, quiet=True), tokenizer, tmp_path
        )


def test_rates_between_saved_models_are_means(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_truths, "CHECKPOINTS", 2)
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


def test_the_state_of_a_stacked_model_is_saved_as_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_truths, "CHECKPOINTS", 1)
    layer = torch.nn.Linear(3, 2)
    layer.save_pretrained = lambda folder: folder.mkdir(parents=True)
    stacked = [torch.full((1, *weight.shape), 5.0, requires_grad=True) for weight in layer.parameters()]
    optimizer = torch.optim.AdamW(stacked, lr=1e-3, weight_decay=0.0)
    for weight in stacked:
        weight.grad = torch.ones_like(weight)
    with after_each_step(Saving(Training(tmp_path), layer, 1)):
        optimizer.step()
    assert torch.allclose(layer.weight, torch.tensor(5.0 - 1e-3))
    state = torch.load(tmp_path / "0" / "optimizer.pt")["state"]
    assert [state[i]["exp_avg"].shape for i in range(2)] == [layer.weight.shape, layer.bias.shape]
    assert state[1]["step"] == 1


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
    text = peer_tables.tables(measured, "python this.py")
    assert "no_such_method" in text
    assert "MRR" in text


def test_a_method_that_reads_models_of_the_training_is_left_out_where_there_are_none(task, tmp_path):
    measured = Measured(task, tmp_path / "measured", tmp_path / "envs", 60)
    measured.measure("captum", [Method("captum", "unrolled", "?", training=True)], costs=False)
    assert not measured.folder.exists()
    assert not measured.environments.exists()


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
    best, judged = predicted(measured, choosing=True), predicted(measured, choosing=False)
    stored(measured, method, "tried-0", np.concatenate([judged, -best]))
    stored(measured, method, "tried-1", np.concatenate([-judged, best]))
    stored(measured, method, "tried-2", np.full((4, 5), np.nan))
    assert method.choices()[measured.choice(method, "halves")] == {"damping": 0.1}
    assert np.allclose(measured.chosen(method, "halves"), -judged, atol=1e-5)


def test_a_costly_method_is_run_with_the_settings_that_a_few_queries_chose(measured):
    method = Method("ours", "bm25", "BM25", grid={"damping": (1.0, 0.1)}, costly=True)
    best = predicted(measured, choosing=True)
    assert [run.queries for run in measured._trials(method)] == [(2, 4), (2, 4)]
    stored(measured, method, "tried-0", best[:1])
    stored(measured, method, "tried-1", -best[:1])
    assert measured.choice(method, "halves") == 0
    assert measured.chosen(method, "halves") is None
    stored(measured, method, "chosen-0", best)
    assert np.allclose(measured.chosen(method, "halves"), best, atol=1e-5)


def test_each_truth_chooses_its_own_settings_among_the_first_ones(measured):
    method = Method("ours", "bm25", "BM25", grid={"damping": (1.0, 0.1, 0.01)})
    for i, truth in enumerate([*TRUTHS, TRUTHS[0]]):
        parts = [predicted(measured, choosing, truth) for choosing in (False, True)]
        stored(measured, method, f"tried-{i}", np.concatenate(parts))
    assert [measured.choice(method, truth) for truth in TRUTHS] == [0, 1]
    assert len(measured.settings(method)) == 3
    assert len(replace(measured, tries=2).settings(method)) == 2


def test_costs_are_those_of_other_queries_where_something_is_stored(measured):
    runs = {run.name.partition("/")[2]: run for run in measured._costs(BM25)}
    assert runs["cold-1"].store == runs["warm-1"].store == runs["warm-10"].store == runs["warm-100"].store
    assert len({runs[name].store for name in ("cold-1", "cold-10", "cold-100")}) == 3
    asked = [set(range(*runs[name].queries)) for name in ("cold-1", "warm-1", "warm-10", "warm-100")]
    assert [len(one) for one in asked] == [1, 1, 10, 100]
    assert len(set.union(*asked)) == 112


def test_costs_of_more_queries_than_there_are_are_left_out(measured):
    (measured.task / "queries.json").write_text(json.dumps([{}] * 20))
    assert [run.name.partition("/")[2] for run in measured._costs(BM25)] == ["cold-1", "cold-10", "warm-1", "warm-10"]


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
    stored(measured, second, "tried-0", np.zeros((4, 5)))
    stored(measured, second, "tried-1", np.full((4, 5), np.nan))
    broken = measured.folder / third.key / "default"
    broken.mkdir(parents=True)
    (broken / "error.txt").write_text("a|b")
    text = peer_tables.tables(measured, "python this.py")
    rows = json.loads((measured.folder / "figures_halves.json").read_text())["rows"]
    assert rows["BM25"]["lds"] == pytest.approx(lds(good, *measured.truth("halves", choosing=False))["lds"])
    assert rows["bergson: EK-FAC"]["lds"] == 0
    assert rows["bergson: EK-FAC"]["ahead"] == pytest.approx(rows["BM25"]["lds"])
    assert "damping 1" in text
    assert "a/b" in text
    costs = json.loads((measured.folder / "figures_costs.json").read_text())["rows"]
    assert costs == {"BM25": {"cold-1": 7.0, "memory": 1.5, "disk": 3.0}}
