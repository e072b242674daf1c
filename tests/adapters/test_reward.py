import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import RewardAdapter, adapter_for
from hf_forward_inf.baselines import RepresentationSimilarity, TracIn
from tests.helpers.texts import SENTENCES, WORDS, assert_close, plain_scores, randomised, tokenizer

PLAIN = AscentConfig(direction="gradient", radius=0.3)
TEMPLATE = "{% for m in messages %}{{ m.content }} {% if m.mood %}maybe {% endif %}[SEP]{% endfor %}"
CHOSEN, REJECTED = SENTENCES, [*SENTENCES[1:], "no cat"]
MARGINS = [0.0, 1.0, 0.5, 0.0, 2.0, 0.0]
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3, "num_labels": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_targets(monkeypatch):
    monkeypatch.setattr("hf_forward_inf.curvature.kronecker.TARGETS", 24)  # quicker, and as good for this


def judge(kind="llama"):
    torch.manual_seed(0)
    return randomised(AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **SIZES)))


def said(text):
    return [{"role": "assistant", "content": text}]


def asked(text):
    return [{"role": "user", "content": text, "mood": None}]


ROWS = {
    "texts": {"chosen": CHOSEN, "rejected": REJECTED},
    "prompt": {"prompt": ["the dog "] * 6, "chosen": CHOSEN, "rejected": REJECTED},
    "margin": {"chosen": CHOSEN, "rejected": REJECTED, "margin": MARGINS},
    "messages": {
        "prompt": [asked("the dog")] * 6,
        "chosen": [said(text) for text in CHOSEN],
        "rejected": [said(text) for text in REJECTED],
    },
}


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("columns", ROWS)
def test_losses_and_scores_are_those_of_rows_by_themselves(kind, columns):
    model, tokens = judge(kind), tokenizer(chat_template=TEMPLATE)
    rows = Dataset.from_dict(ROWS[columns])

    def reward(row, name):
        if columns == "messages":
            ids = tokens(f"the dog [SEP]{ROWS['texts'][name][row]} [SEP]", add_special_tokens=False)["input_ids"]
        else:
            ids = tokens(("the dog " if columns == "prompt" else "") + rows[row][name] + "[SEP]")["input_ids"]
        return model(input_ids=torch.tensor([ids])).logits[0, 0]

    def loss(row):
        margin = MARGINS[row] if columns == "margin" else 0.0
        return -logsigmoid(reward(row, "chosen") - reward(row, "rejected") - margin)

    tracer = ForwardInf(model, tokens, ascent=PLAIN)
    adapter = tracer.adapter
    batch, expected = adapter.collate(adapter.encode(rows[:])), [loss(row).item() for row in range(6)]
    np.testing.assert_allclose(adapter.loss(model, batch).detach(), expected, rtol=1e-5)
    outputs, summed = adapter.outputs_and_loss(model, batch)
    assert summed(outputs).item() == pytest.approx(sum(expected), rel=1e-5)
    assert_close(tracer.trace(rows.select([1]), rows).scores[0], plain_scores(model, loss, 1, range(6), 0.3))
    default = ForwardInf(model, tokens).trace(rows.select([1]), rows)
    assert default.config["direction"] == "cg" and np.isfinite(default.scores).all()


@pytest.mark.parametrize("columns", ROWS)
def test_the_loss_is_that_of_trls_trainer(columns, tmp_path):
    trl = pytest.importorskip("trl")
    model, tokens, rows = judge(), tokenizer(chat_template=TEMPLATE), Dataset.from_dict(ROWS[columns])
    adapter = RewardAdapter(model, tokens)
    found = adapter.loss(model, adapter.collate(adapter.encode(rows[:]))).mean().item()
    options = trl.RewardConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)
    if columns == "messages":  # TRL prints keys without a value as templates do
        rows = Dataset.from_dict({**ROWS[columns], "prompt": [[{"role": "user", "content": "the dog"}]] * 6})
    trainer = trl.RewardTrainer(model, options, train_dataset=rows, processing_class=tokens)
    model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    with torch.no_grad():
        assert found == pytest.approx(trainer.compute_loss(model, batch).item(), rel=1e-5)


def test_texts_with_numbers_have_squared_errors():
    model, tokens = judge("bert"), tokenizer()
    rows = Dataset.from_dict({"text": SENTENCES, "label": MARGINS})
    adapter = adapter_for(model, tokens)
    batch = adapter.collate(adapter.encode(adapter.prepare(rows)[:]))
    one = [
        model(**tokens(text, return_tensors="pt"), labels=torch.tensor([label])).loss.item()
        for text, label in zip(SENTENCES, MARGINS, strict=True)
    ]
    np.testing.assert_allclose(adapter.loss(model, batch).detach(), one, rtol=1e-5)


def test_a_drawn_preference_has_a_gradient_whose_covariance_is_the_hessian():
    adapter = RewardAdapter(judge(), tokenizer())
    batch = adapter.collate(adapter.encode({"chosen": CHOSEN[:1], "rejected": REJECTED[:1]}))
    outputs, loss = adapter.outputs_and_loss(adapter.model, batch)
    hessian = torch.autograd.functional.hessian(lambda one: loss(one[None]), outputs[0].detach())
    drawn = adapter.sampled_output_gradients(outputs.detach().expand(40_000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.T @ drawn / 40_000, hessian, atol=0.01, rtol=0.02)


def test_baselines_and_self_influence_run():
    model, rows = judge(), Dataset.from_dict(ROWS["texts"])
    similar = RepresentationSimilarity(model, tokenizer()).trace(rows, rows)
    assert [similar.ranking(i)[0] for i in range(6)] == list(range(6))
    assert np.isfinite(TracIn(model, tokenizer()).trace(rows, rows).scores).all()
    tracer = ForwardInf(model, tokenizer(), ascent=PLAIN)
    own = [tracer.trace(rows.select([i]), rows.select([i])).scores[0, 0] for i in range(6)]
    np.testing.assert_allclose(tracer.self_influence(rows), own, rtol=1e-4)


def test_rows_that_cannot_be_read_are_named():
    tracer, good = ForwardInf(judge(), tokenizer(), ascent=PLAIN), Dataset.from_dict(ROWS["texts"]).select([0])
    for rows, message in [
        (
            {"chosen": ["yes", "yes"], "rejected": ["no", None]},
            "row 1: `rejected` must be a text or a list of",
        ),
        ({"chosen": ["yes " * 40], "rejected": ["no"]}, r"row 0: it has 43 tokens, and the model reads 32"),
        ({"prompt": [asked("no")], "chosen": ["yes"], "rejected": ["no"]}, "and `prompt` of the same kind"),
        ({"chosen": ["yes"]}, "no texts that are known among the columns chosen"),
    ]:
        with pytest.raises(ValueError, match=message):
            tracer.trace(good, Dataset.from_dict(rows))
