import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import MaskedLMAdapter, adapter_for
from hf_forward_inf.baselines import RepresentationSimilarity
from tests.helpers.texts import SENTENCES, WORDS, assert_close, plain_scores, randomised, tokenizer

PLAIN = AscentConfig(direction="gradient", radius=0.3)
MASK = WORDS.index("[MASK]")
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SIZES, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, local_attention=4)
    ),
}


@pytest.fixture(autouse=True)
def few_targets(monkeypatch):
    monkeypatch.setattr("hf_forward_inf.curvature.kronecker.TARGETS", 24)  # quicker, and as good for this


def filler(kind="bert"):
    torch.manual_seed(0)
    return randomised(MODELS[kind]())


def filled(text, words):
    """Tokens of a text with masks, and labels: the words in their places."""
    ids, left = tokenizer()(text)["input_ids"], iter(words)
    return torch.tensor([ids]), torch.tensor([[WORDS.index(next(left)) if i == MASK else -100 for i in ids]])


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_scores_of_filled_masks_are_those_of_transformers_for_one_row(kind):
    model = filler(kind)
    texts = ["the capital of [MASK] is Lima .", "a [MASK] sat on the [MASK]", "[MASK]", "yes or [MASK] the dog"]
    words = [["Peru"], ["cat", "mat"], ["maybe"], ["dog"]]
    rows = Dataset.from_dict({"text": texts, "labels": words})
    tracer = ForwardInf(model, tokenizer(), ascent=PLAIN)

    def loss(row):
        ids, labels = filled(texts[row], words[row])
        return model(input_ids=ids, labels=labels).loss * len(words[row])

    batch, expected = tracer.adapter.collate(tracer.adapter.encode(rows[:])), [loss(row).item() for row in range(4)]
    np.testing.assert_allclose(tracer.adapter.loss(model, batch).detach(), expected, rtol=1e-5)
    outputs, summed = tracer.adapter.outputs_and_loss(model, batch)
    assert outputs.shape == (5, len(WORDS)) and summed(outputs).item() == pytest.approx(sum(expected), rel=1e-5)
    found = tracer.trace(Dataset.from_dict({"text": texts[:1], "labels": ["Peru"]}), rows)  # a word, for one mask
    assert_close(found.scores[0], plain_scores(model, loss, 0, range(4), 0.3))


def test_masks_are_drawn_by_seed_and_text_alone():
    adapter = adapter_for(filler(), tokenizer())
    features = adapter.encode({"text": SENTENCES * 2})
    assert features["input_ids"][:6] == features["input_ids"][6:]
    for text, ids, labels in zip(SENTENCES, features["input_ids"], features["labels"], strict=False):
        own = tokenizer()(text)["input_ids"]
        masked = [i for i, token in enumerate(ids) if token == MASK]
        assert len(masked) == max(1, round(0.15 * (len(own) - 2)))
        assert [
            label if i in masked else token for i, (token, label) in enumerate(zip(ids, labels, strict=True))
        ] == own
        assert all((labels[i] == own[i]) == (i in masked) for i in range(len(own)))
    other = MaskedLMAdapter(filler(), tokenizer(), seed=1, mlm_probability=0.5)
    assert other.cache_key != adapter.cache_key
    assert sum(other.encode({"text": SENTENCES})["terms"]) > 2 * sum(features["terms"][:6])


def test_texts_are_traced_by_default_and_baselines_run():
    model, rows = filler(), Dataset.from_dict({"text": SENTENCES})
    query = Dataset.from_dict({"text": ["the capital of [MASK] is Lima ."], "labels": ["Peru"]})
    found = ForwardInf(model, tokenizer()).trace(query, rows)
    assert found.config["direction"] == "kfac" and np.isfinite(found.scores).all()
    similar = RepresentationSimilarity(model, tokenizer()).trace(rows, rows)
    assert [similar.ranking(i)[0] for i in range(6)] == list(range(6))


def test_masks_are_filled_in_and_the_answer_is_traced():
    model, text = filler(), "a [MASK] sat on the [MASK]"
    tracer = ForwardInf(model, tokenizer(), ascent=PLAIN)
    ids, _ = filled(text, ["cat", "mat"])
    best = model(input_ids=ids).logits[0].argmax(-1)
    expected = [WORDS[i] for i in best[ids[0] == MASK]]
    assert tracer.adapter.answer({"text": [text]}) == [expected]
    found = tracer.trace_generation([text], Dataset.from_dict({"text": SENTENCES}))
    assert found.queries["labels"][:] == [expected]


def test_labels_of_every_token_are_taken_as_they_are():
    ids, labels = filled("a [MASK] sat", ["cat"])
    features = adapter_for(filler(), tokenizer()).encode({"text": ["a [MASK] sat"], "labels": labels.tolist()})
    assert features["labels"] == labels.tolist() and features["input_ids"] == ids.tolist()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["yes", "a [MASK]"]}, r"row 1: it holds masks, and no `labels` say what belongs there"),
        ({"text": ["a [MASK]"], "labels": [["cat", "dog"]]}, "it has 1 masks and 2 labels for them"),
        ({"text": ["a [MASK]"], "labels": ["cat dog"]}, "'cat dog' is not one token"),
        ({"text": ["a [MASK]"], "labels": ["Paris"]}, "'Paris' is not one token"),
        ({"text": ["a [MASK]"], "labels": [[-100, 7]]}, "it has 4 tokens and 2 labels"),
        ({"text": [3]}, r"row 0: `text` holds a int, not a text"),
        ({"text": [""]}, "Nothing to predict in candidates row 0"),
    ],
)
def test_rows_that_cannot_be_read_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        ForwardInf(filler(), tokenizer(), ascent=PLAIN).trace(
            Dataset.from_dict({"text": ["yes"]}), Dataset.from_dict(rows)
        )
