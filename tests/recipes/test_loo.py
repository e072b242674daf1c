import json
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from experiments import retrainable_texts
from experiments.finetuning import FineTuning
from experiments.lds import LdsOptions
from experiments.loo import LooOptions
from experiments.retrainable_texts import BLOCK, read_texts, texts

from hf_forward_inf.cli import run_command
from hf_forward_inf.data import builtin_facts
from hf_forward_inf.utils.rows import fill_in
from tests.helpers.recipes import recipe

TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip

SLOW = (
    "influence_functions_lissa",
    "influence_functions_kfac_cg",
    "influence_functions",
    "influence_functions_cosine",
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(retrainable_texts, "SIZES", TINY)
    monkeypatch.setattr(retrainable_texts, "VOCABULARY", 300)
    for settings in ("PRETRAINING", "TUNING"):
        own = getattr(retrainable_texts, settings)
        monkeypatch.setattr(retrainable_texts, settings, {**own, "epochs": 1, "batch_length": 512})


def plain_training(adapter, texts, subset, order, rate):
    """AdamW on the sum of the remaining rows' losses over the tokens of all rows of a batch."""
    model = type(adapter.model)(adapter.model.config)
    model.load_state_dict(adapter.model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    for step, batch in enumerate(order):
        optimizer.param_groups[0]["lr"] = rate(step)
        loss, tokens = 0.0 * sum(weight.sum() for weight in model.parameters()), 0
        for row in batch:
            ids = torch.tensor([adapter.tokenizer(texts[row])["input_ids"]])
            tokens += ids.shape[1] - 1
            if subset[row]:
                logits = model(input_ids=ids).logits[0, :-1]
                loss = loss + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        optimizer.zero_grad()
        (loss / tokens).backward()
        optimizer.step()
    return model


def test_a_row_that_is_left_out_has_weight_0_in_its_batch_and_nothing_else_changes():
    task = texts(12, 2)
    adapter, rows = task.adapter(0), task.candidates["text"][:]
    training = FineTuning(adapter, task.candidates, task.queries, epochs=2, learning_rate=1e-2, batch_length=64)
    order = [batch.tolist() for batch, _ in training._batches(np.random.default_rng(5))]
    assert sorted(chain.from_iterable(order)) == sorted([*range(12)] * 2) and len(order) > 4
    subset = np.arange(12) != order[1][0]
    steps = len(order)
    plain = plain_training(adapter, rows, subset, order, lambda step: 1e-2 * min(1, (steps - step) / steps))
    found = training.model(5, subset)
    for mine, expected in zip(found.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-4, rtol=0)
    assert not torch.equal(found.lm_head.weight, training.model(5).lm_head.weight)
    together = training(np.stack([~subset, subset, subset]), np.array([5, 6, 5]))  # two of them stacked
    np.testing.assert_allclose(together[2], training(subset[None], np.array([5]))[0], atol=1e-3)
    assert np.abs(together[2] - together[:2]).max() > 0.1


def test_a_batch_that_is_empty_still_takes_its_step():
    task = texts(6, 2)
    adapter = task.adapter(0)
    training = FineTuning(adapter, task.candidates, task.queries, epochs=3, learning_rate=1e-2, batch_length=1)
    order = [batch.tolist() for batch, _ in training._batches(np.random.default_rng(1))]
    assert all(len(batch) == 1 for batch in order)
    subset = np.arange(6) != order[1][0]
    rate = training._rate(len(order))
    plain = plain_training(adapter, task.candidates["text"][:], subset, order, lambda step: 1e-2 * rate(step))
    for mine, expected in zip(training.model(1, subset).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, atol=5e-4, rtol=0)


def test_topics_are_for_pretraining_or_for_fine_tuning():
    found = read_texts(None)
    rows = builtin_facts()["abstracts"]
    columns = (rows[name] for name in ("inputs_pretokenized", "targets_pretokenized", "facts"))
    topic = {fill_in(text, target): facts[0].split(",", 2)[-1] for text, target, facts in zip(*columns, strict=True)}
    tuned, rest = ({topic[text] for text in side} for side in (found.tuned, found.rest))
    assert not tuned & rest
    assert set(topic) == {*found.tuned, *found.rest}
    assert 0.6 < len(found.tuned) / len(topic) < 0.75


def test_queries_are_not_among_the_candidates():
    task = texts(100, 10)
    asked = {*task.queries["text"], *task.others["text"]}
    assert (len(task.candidates), len(asked)) == (100, 20)
    assert not asked & set(task.candidates["text"])
    blocks = texts(20, 10, blocks=True)
    assert {len(ids) for ids in blocks.candidates["input_ids"]} == {BLOCK}
    read = " ".join(blocks.candidates["text"])
    assert not any(text in read for text in blocks.queries["text"])
    with pytest.raises(ValueError, match="don't fit into"):
        texts(100_000, 10)
    with pytest.raises(ValueError, match="5000 blocks of 128 tokens don't fit into"):
        texts(5000, 10, blocks=True)


def test_more_epochs_are_another_training():
    longer, usual = texts(6, 2, epochs=3), texts(6, 2)
    assert len(longer.train(longer.queries)._batches(np.random.default_rng(0))) == 3
    assert len(usual.train(usual.queries)._batches(np.random.default_rng(0))) == 2
    assert longer.key != usual.key


def test_single_blocks_are_left_out_and_every_attributor_is_judged(tmp_path):
    words = ["--num_candidates", "16", "--left_out", "4", "--num_queries", "3", "--seeds", "2", "--models", "2"]
    arguments = ["--output", str(tmp_path), *words, "--without", *SLOW]
    assert run_command(recipe("loo").main, LooOptions, arguments=arguments, bars=False) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("forward_inf_auto", "influence_functions_ekfac", "trackstar", "bm25", "random"):
        assert found[f"{name}/lead"] == pytest.approx(found["lds"] - found[f"{name}/lds"], abs=1e-6)
    assert "influence_functions/lds" not in found
    with pytest.raises(ValueError, match="--left_out 50 of 20 blocks: leave out fewer"):
        LooOptions(num_candidates=20)


def test_a_model_and_texts_from_folders_are_fine_tuned_without_a_few_rows(tmp_path):
    base = texts(20, 2).adapter(0)
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_dict({"text": [*read_texts(None).tuned[:90], ""]}).to_parquet(tmp_path / "rows.parquet")
    words = ["--task", "texts", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.parquet")]
    words += ["--num_candidates", "40", "--num_queries", "2", "--subsets", "3", "--drop", "0.05", "--qld", "2"]
    words += ["--qld_methods", "forward_inf", "bm25", "--without", *SLOW, "--output", str(tmp_path / "o")]
    assert run_command(recipe("lds").main, LdsOptions, arguments=words, bars=False) == 0
    found = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert {"lds", "qld", "bm25/qld_low", "random/lds"} <= set(found)
    assert "random/qld" not in found and "tuned/direction" not in found
