import numpy as np
import pytest
import torch
from datasets import ClassLabel as Classes
from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LayoutLMConfig, LayoutLMForSequenceClassification

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import SequenceClassificationAdapter, adapter_for
from hf_forward_inf.baselines import RepresentationSimilarity, TracIn
from tests.helpers.line import assert_same_state, state
from tests.helpers.texts import SENTENCES, WORDS, assert_close, plain_scores, randomised, tokenizer

PLAIN = AscentConfig(direction="gradient", radius=0.3)
PAIRS = list(zip(SENTENCES, SENTENCES[::-1], strict=True))
LABELS = {
    "one class": [0, 1, 2, 0, 1, 2],
    "several classes": [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0] * 3, [1.0] * 3, [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    "numbers": [[0.5, -1.0, 2.0], [0.0, 1.0, 0.0], [0.0] * 3, [-1.0] * 3, [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    "a number": [0.5, 1.0, -2.0, 0.0, 3.0, 0.25],
}
KINDS = {
    "one class": {"num_labels": 3},
    "several classes": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "numbers": {"num_labels": 3, "problem_type": "regression"},
    "a number": {"num_labels": 1},
}


def classifier(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return randomised(
        BertForSequenceClassification(
            BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0, **sizes, **options)
        )
    )


def own_loss(model, kind, texts):
    """Transformers' loss of one row by itself."""

    def loss(row):
        label = torch.tensor([LABELS[kind][row]])
        return model(**tokenizer()(*texts[row], return_tensors="pt"), labels=label).loss

    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [("text",), ("premise", "hypothesis")])
def test_losses_and_scores_are_those_of_transformers_for_one_row(kind, columns):
    model = classifier(**KINDS[kind])
    texts = PAIRS if len(columns) == 2 else [(sentence,) for sentence in SENTENCES]
    data = {name: list(values) for name, values in zip(columns, zip(*texts, strict=True), strict=True)}
    rows, before = Dataset.from_dict({**data, "label": LABELS[kind]}), state(model)
    tracer = ForwardInf(model, tokenizer(), ascent=PLAIN)
    adapter, loss = tracer.adapter, own_loss(model, kind, texts)
    expected = [loss(row).item() for row in range(6)]
    batch = adapter.collate(adapter.encode(adapter.prepare(rows)[:]))
    np.testing.assert_allclose(adapter.loss(model, batch).detach(), expected, rtol=1e-5)
    outputs, summed = adapter.outputs_and_loss(model, batch)
    assert summed(outputs).item() == pytest.approx(sum(expected), rel=1e-5)
    assert_close(tracer.trace(rows.select([1]), rows).scores[0], plain_scores(model, loss, 1, range(6), 0.3))
    assert_same_state(before, state(model))


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_labels_have_gradients_whose_covariance_is_the_hessian(kind):
    model = classifier(**KINDS[kind])
    adapter = adapter_for(model, tokenizer())
    rows = Dataset.from_dict({"text": SENTENCES[:1], "label": LABELS[kind][:1]})
    batch = adapter.collate(adapter.encode(adapter.prepare(rows)[:]))
    outputs, loss = adapter.outputs_and_loss(model, batch)
    hessian = torch.autograd.functional.hessian(lambda one: loss(one[None]), outputs[0].detach())
    many = outputs.detach().expand(40_000, -1)
    drawn = adapter.sampled_output_gradients(many, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.T @ drawn / len(many), hessian, atol=0.02, rtol=0.02)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(len(hessian)), atol=0.02, rtol=0)


def test_segments_of_pairs_count():
    model = classifier(num_labels=3)
    rows = Dataset.from_dict(
        {"sentence1": [a for a, _ in PAIRS], "sentence2": [b for _, b in PAIRS], "label": [0] * 6}
    )
    adapter = adapter_for(model, tokenizer())
    features = adapter.encode(rows[:])
    assert features["token_type_ids"][2] == [0] * 3 + [1] * 8  # [CLS] yes [SEP], the capital ... [SEP]
    batch = adapter.collate(features)
    moved = {**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    assert (adapter.loss(model, batch) - adapter.loss(model, moved)).abs().min() > 1e-3


def test_a_model_answers_texts_without_labels_and_its_answers_are_traced():
    model = classifier(num_labels=3)
    rows = Dataset.from_dict({"text": SENTENCES, "label": LABELS["one class"]})
    tracer = ForwardInf(model, tokenizer(), ascent=PLAIN)
    with torch.no_grad():
        logits = [model(**tokenizer()(text, return_tensors="pt")).logits for text in SENTENCES]
    expected = torch.cat(logits).argmax(1).tolist()
    assert tracer.adapter.answer({"text": SENTENCES}) == expected
    found = tracer.trace_generation(SENTENCES[:2], rows)
    assert found.queries["label"][:] == expected[:2] and found.scores.shape == (2, 6)
    half = Dataset.from_dict({"text": SENTENCES[:2], "label": [2, None]})
    assert tracer.trace(half, rows).queries["label"][:] == [2, expected[1]]
    pairs = Dataset.from_dict({"premise": SENTENCES, "hypothesis": SENTENCES, "label": [0] * 6})
    asked = tracer.trace_generation([{"premise": SENTENCES[0], "hypothesis": SENTENCES[1]}], pairs)
    assert asked.queries.column_names == ["premise", "hypothesis", "label"]
    several = adapter_for(classifier(**KINDS["several classes"]), tokenizer())
    signs = [[float(one > 0) for one in row[0]] for row in logits]
    assert several.answer({"text": SENTENCES}) == signs


def test_a_number_that_the_model_predicts_itself_is_no_question():
    rows = Dataset.from_dict({"text": SENTENCES, "label": LABELS["a number"]})
    with pytest.raises(NotImplementedError, match="has no loss that could be raised: give queries a `label`"):
        ForwardInf(classifier(num_labels=1), tokenizer()).trace_generation("yes", rows)


def test_baselines_and_self_influence_run():
    model = classifier(num_labels=3)
    rows = Dataset.from_dict({"text": SENTENCES, "label": LABELS["one class"]})
    for attributor in (TracIn(model, tokenizer()), RepresentationSimilarity(model, tokenizer())):
        found = attributor.trace(rows, rows)
        assert [found.ranking(i)[0] for i in range(6)] == list(range(6)) or attributor.name.startswith("tracin")
        assert np.isfinite(found.scores).all()
    tracer = ForwardInf(model, tokenizer(), ascent=PLAIN)
    own = [tracer.trace(rows.select([i]), rows.select([i])).scores[0, 0] for i in range(6)]
    np.testing.assert_allclose(tracer.self_influence(rows), own, rtol=1e-4)


def test_rows_beyond_a_stated_limit_are_cut_as_the_tokenizer_cuts_them():
    tokens, model = tokenizer(), classifier(num_labels=3)
    adapter = SequenceClassificationAdapter(model, tokens, max_length=9)
    rows = {"sentence1": [PAIRS[0][0]], "sentence2": [PAIRS[0][1]], "label": [0]}
    features = adapter.encode(rows)
    assert features["truncated"] == [True]
    assert features["input_ids"][0] == tokens(*PAIRS[0], truncation=True, max_length=9)["input_ids"]
    with pytest.warns(UserWarning, match="of 6 rows, 4 lose their ends"):
        small = ForwardInf(adapter=SequenceClassificationAdapter(model, tokens, max_length=8), ascent=PLAIN)
        small.trace(
            Dataset.from_dict({"text": ["yes"], "label": [0]}),
            Dataset.from_dict({"text": SENTENCES, "label": [0] * 6}),
        )


def test_columns_are_those_of_glue_or_the_users_own():
    model, tokens = classifier(num_labels=3), tokenizer()
    adapter = adapter_for(model, tokens)
    assert adapter.columns_in(["idx", "label", "sentence"]) == ("sentence", "label")
    assert adapter.columns_in(["question", "sentence", "labels"]) == ("question", "sentence", "labels")
    own = SequenceClassificationAdapter(model, tokens, text_column="title", pair_column="body", label_column="kind")
    assert own.columns_in(["text", "title", "body", "kind"]) == ("title", "body", "kind")
    for names, message in [
        (["content", "label"], "no texts that are known among the columns content, label"),
        (["text", "sentence1", "sentence2", "label"], "several texts among the columns"),
        (["text", "label", "labels"], "several columns for the label: label, labels"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapter.columns_in(names)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("one class", {"text": ["yes", None], "label": [0, 1]}, r"row 1 can't be read \(row 1: `text` holds nothing"),
        ("one class", {"text": [["yes"], ["no"]], "label": [0, 1]}, r"row 0: `text` holds a list, not a text"),
        ("one class", {"text": ["yes", "no"], "label": [0, 3]}, r"`label` holds 3 in row 1, but .* classes 0 to 2"),
        ("one class", {"text": ["yes"], "label": [[1.0, 0.0, 0.0]]}, r"holds \[1.0, 0.0, 0.0\] in row 0; a label is"),
        ("one class", {"text": ["yes", "no"], "label": [0, None]}, "Nothing to predict in candidates row 1: `label`"),
        ("several classes", {"text": ["yes"], "label": [1]}, "holds 1 in row 0; a label of a model for several"),
        ("several classes", {"text": ["yes"], "label": [[0, 1]]}, "a list of 3 zeros and ones"),
        ("a number", {"text": ["yes"], "label": ["high"]}, "holds high in row 0, but the model predicts one number"),
        ("numbers", {"text": ["yes"], "label": [1.0]}, "the model predicts 3 numbers a row"),
    ],
)
def test_rows_that_cannot_be_read_are_named(kind, rows, message):
    model = classifier(**KINDS[kind])
    good = Dataset.from_dict({"text": ["yes"], "label": LABELS[kind][:1]})
    with pytest.raises(ValueError, match=message):
        ForwardInf(model, tokenizer(), ascent=PLAIN).trace(good, Dataset.from_dict(rows))


def test_models_of_other_kinds_are_refused():
    with pytest.raises(TypeError, match="needs its tokenizer"):
        ForwardInf(classifier(num_labels=2))
    with pytest.raises(TypeError, match="no head for sequence classification"):
        SequenceClassificationAdapter(nn.Linear(1, 2), tokenizer())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    with pytest.raises(TypeError, match="reads boxes on a page besides text"):
        ForwardInf(LayoutLMForSequenceClassification(LayoutLMConfig(vocab_size=30, **sizes)), tokenizer())
    with pytest.raises(ValueError, match="objective='margin' is for one class a row"):
        SequenceClassificationAdapter(classifier(**KINDS["numbers"]), tokenizer(), objective="margin").cache_key  # noqa: B018


NAMED = {"num_labels": 3, "id2label": {0: "cat", 1: "dog", 2: "bird"}}


@pytest.mark.parametrize(
    ("model", "feature", "labels"),
    [
        (NAMED, Classes(names=["bird", "cat", "dog"]), [1, 2, 0, 1, 2, 0]),
        (NAMED, Classes(names=["Dog", "Cat", "Bird", "fish"]), [1, 0, 2, 1, 0, 2]),
        (NAMED, Value("string"), ["cat", "dog", "bird", "cat", "dog", "bird"]),
        (NAMED, Value("int64"), [0, 1, 2, 0, 1, 2]),
        ({"num_labels": 3}, Classes(names=["x", "y", "z"]), [0, 1, 2, 0, 1, 2]),
    ],
)
def test_classes_are_matched_by_name(model, feature, labels):
    rows = Dataset.from_dict(
        {"text": SENTENCES, "label": labels}, features=Features({"text": Value("string"), "label": feature})
    )
    adapter = adapter_for(classifier(**model), tokenizer())
    assert adapter.prepare(rows)["label"][:] == [0, 1, 2, 0, 1, 2]
    assert adapter.prepare(rows.select([4, 2]))["label"][:] == [1, 2]


def test_sets_of_classes_are_matched_by_name():
    adapter = adapter_for(classifier(**NAMED, problem_type="multi_label_classification"), tokenizer())
    feature = List(Classes(names=["bird", "cat", "dog"]))
    rows = Dataset.from_dict(
        {"text": ["yes"] * 3, "label": [[0, 1], [2], []]},
        features=Features({"text": Value("string"), "label": feature}),
    )
    expected = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert adapter.prepare(rows)["label"][:] == expected
    named = Dataset.from_dict({"text": ["yes"] * 2, "label": [["bird", "cat"], ["dog"]]})
    assert adapter.prepare(named)["label"][:] == expected[:2]


def test_names_that_the_model_does_not_have_are_refused_or_warned_of():
    adapter = adapter_for(classifier(**NAMED), tokenizer())

    def rows(names, labels):
        feature = Features({"text": Value("string"), "label": Classes(names=names)})
        return Dataset.from_dict({"text": ["yes"] * len(labels), "label": labels}, features=feature)

    with pytest.raises(ValueError, match="holds 1 in row 2; a label is an integer from 0, or one of the model's"):
        adapter.prepare(rows(["cat", "fish"], [0, 0, 1]))
    with pytest.warns(UserWarning, match="classes 'good', 'bad' are none of the model's, 'cat', 'dog', 'bird'"):
        assert adapter.prepare(rows(["good", "bad"], [0, 1]))["label"][:] == [0, 1]
