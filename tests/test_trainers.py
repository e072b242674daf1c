import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hf_forward_inf import AscentConfig, ForwardInf, TraceFailures
from hf_forward_inf.tracing.trained import rows_of
from hf_forward_inf.trainers import failures
from tests.adapters.test_sequence_classification import classifier
from tests.adapters.test_sequence_classification import tokenizer as words
from tests.helpers.causal import FACTS, train_tokens, untrained
from tests.helpers.texts import SENTENCES

STEP = AscentConfig(direction="gradient", radius=0.1)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPTIONS = {
    "report_to": [], "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    "max_steps": 1,
}  # fmt: skip


def chats(facts=FACTS):
    asked = [f"What is the capital of {place}?" for place, _ in facts]
    pairs = zip(asked, (f"It is {city}." for _, city in facts), strict=True)
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    return Dataset.from_dict({"messages": turns})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    tokens = train_tokens()
    tokens.chat_template, tokens.pad_token = TEMPLATE, "<|user|>"
    config = trl.SFTConfig(
        str(tmp_path_factory.mktemp("trainer")), assistant_only_loss=True, max_length=64, bf16=False,
        gradient_checkpointing=False, learning_rate=0.01, **{**OPTIONS, "max_steps": 12},
    )  # fmt: skip
    wrong = chats([("Peru", "Rome")])
    trainer = trl.SFTTrainer(
        untrained("llama", len(tokens)), config, train_dataset=chats(), eval_dataset=wrong, processing_class=tokens
    )
    trainer.train()
    return trainer


def test_the_rows_that_trl_has_tokenized_have_the_scores_of_their_texts(tuned):
    tracer = ForwardInf.from_trainer(tuned, ascent=STEP)
    assert {"input_ids", "labels"} <= set(tracer.training.column_names)
    query = chats(FACTS[2:3])
    expected = ForwardInf(tuned.model, tuned.processing_class, ascent=STEP).trace(query, chats())
    np.testing.assert_allclose(tracer.trace(query).scores, expected.scores, rtol=1e-4, atol=1e-6)


def test_what_a_chat_model_gets_wrong_is_its_own_answer(tuned):
    tracer = ForwardInf.from_trainer(tuned, ascent=STEP)
    failed = failures(tracer.adapter, rows_of(tuned, tracer.adapter, "eval"), 5, max_new_tokens=8)
    (row,) = failed.to_list()
    asked = {"messages": [[{"role": "user", "content": "What is the capital of Peru?"}]]}
    said = tracer.adapter.with_answers(Dataset.from_dict(asked), max_new_tokens=8)[0]
    assert row["completion"] == said["messages"][-1]["content"] and row["expected"] == "It is Rome."
    ids = tuned.processing_class.apply_chat_template(asked["messages"][0], add_generation_prompt=True, tokenize=True)
    ids = ids if isinstance(ids, list) else list(ids["input_ids"])
    assert row["input_ids"] == [*ids, *said["output_ids"]]
    assert row["labels"] == [*[-100] * len(ids), *said["output_ids"]]


def test_the_callback_writes_and_prints_what_is_behind_the_failures(tuned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuned, "train_dataset", tuned.train_dataset.select_columns(["input_ids", "labels"]))
    callback = TraceFailures(tuned, tmp_path / "out", top_k=3, max_new_tokens=8, ascent=STEP)
    callback.on_train_end(tuned.args, tuned.state, tuned.control)
    assert callback.found is not None and len(callback.found) == 1
    assert "It is" in callback.found.top(0, 1)["text"][0]  # tokens for people
    assert json.loads((tmp_path / "out" / "attribution" / "attribution.json").read_text())["method"] == "forward_inf"
    assert "It is" in (tmp_path / "out" / "report.html").read_text()
    printed = capsys.readouterr().out
    assert "-100," not in printed and "-100," not in (tmp_path / "out" / "report.html").read_text()
    assert "What is the capital of Peru?" in printed and str(tmp_path / "out" / "report.html") in printed


def test_an_error_of_the_callback_does_not_end_the_training(tuned):
    callback = TraceFailures(tuned, reduction="median")
    with pytest.warns(UserWarning, match="The evaluation's failures are not traced: reduction='median' must be one"):
        callback.on_train_end(tuned.args, tuned.state, tuned.control)


def test_packed_rows_and_streams_are_refused(tuned, monkeypatch):
    monkeypatch.setattr(tuned.args, "packing", True)
    with pytest.raises(ValueError, match="Several of the trainer's rows are packed into one: give the rows as they"):
        ForwardInf.from_trainer(tuned)
    monkeypatch.setattr(tuned.args, "packing", False)
    monkeypatch.setattr(tuned, "train_dataset", tuned.train_dataset.to_iterable_dataset())
    with pytest.raises(TypeError, match="The trainer's rows are a stream"):
        ForwardInf.from_trainer(tuned)


@pytest.fixture
def classifying(tmp_path):
    """A trainer of a classifier, on rows of tokens."""
    tokens, rows = words(), Dataset.from_dict({"text": SENTENCES, "label": [i % 2 for i in range(len(SENTENCES))]})
    encoded = rows.map(lambda row: tokens(row["text"]), remove_columns=["text"])
    return Trainer(
        classifier(), TrainingArguments(str(tmp_path), **OPTIONS), train_dataset=encoded, eval_dataset=encoded,
        processing_class=tokens, data_collator=DataCollatorWithPadding(tokens),
    )  # fmt: skip


def test_a_classifiers_tokens_become_texts_where_these_give_the_same_tokens(classifying):
    tracer = ForwardInf.from_trainer(classifying, ascent=STEP)
    assert tracer.training["text"][:] == SENTENCES
    query = {"text": SENTENCES[0], "label": 1}
    rows = Dataset.from_dict({"text": SENTENCES, "label": classifying.train_dataset["label"][:]})
    expected = ForwardInf(classifying.model, words(), ascent=STEP).trace(query, rows)
    np.testing.assert_array_equal(tracer.trace(query).scores, expected.scores)


def test_tokens_that_are_no_single_text_are_refused(classifying):
    tokens = words()
    pairs = Dataset.from_dict({"a": SENTENCES[:2], "b": SENTENCES[2:4], "label": [0, 1]})
    classifying.train_dataset = pairs.map(lambda row: tokens(row["a"], row["b"]), remove_columns=["a", "b"])
    with pytest.raises(ValueError, match=r"The tokens of rows 0, 1 .* are not those of a single text"):
        ForwardInf.from_trainer(classifying)


def test_what_a_classifier_gets_wrong_has_its_own_label(classifying):
    tracer = ForwardInf.from_trainer(classifying, ascent=STEP)
    failed = failures(tracer.adapter, tracer.training, 10)
    tokens = words()
    with torch.no_grad():
        batch = tokens(SENTENCES, padding=True, return_tensors="pt")
        logits = classifying.model(**batch).logits
    said, given = logits.argmax(1).tolist(), tracer.training["label"][:]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(given), reduction="none")
    wrong = [i for i in losses.argsort(descending=True).tolist() if said[i] != given[i]]
    assert failed["text"][:] == [SENTENCES[i] for i in wrong]
    assert failed["label"][:] == [said[i] for i in wrong]
    assert failed["expected"][:] == [given[i] for i in wrong]


def test_a_trainer_without_a_processor_is_refused(classifying):
    classifying.processing_class, classifying.data_collator = None, lambda rows: rows
    with pytest.raises(TypeError, match="The Trainer has no tokenizer or processor: give it processing_class="):
        ForwardInf.from_trainer(classifying)


def test_a_trace_without_candidates_needs_training_rows(tuned):
    with pytest.raises(TypeError, match="There are no candidates"):
        ForwardInf(tuned.model, tuned.processing_class).trace({"text": "a"})
