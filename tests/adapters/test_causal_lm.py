import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForMaskedLM, GPT2LMHeadModel

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter, adapter_for
from hf_forward_inf.ascent.parameters import perturbed_names
from hf_forward_inf.baselines import InfluenceFunctions, RepresentationSimilarity, TracIn, TrackStar
from tests.helpers.causal import LAYOUTS, questions, train_tokens, untrained
from tests.helpers.line import assert_same_state, state


@pytest.fixture(scope="module")
def tokens():
    return train_tokens()


@pytest.fixture(params=LAYOUTS)
def network(request, tokens):
    return untrained(request.param, len(tokens))


@pytest.fixture(scope="module")
def rows():
    return questions()


def counted_text(tokens, encoded, row):
    """The text of the tokens that count."""
    return tokens.decode([label for label in encoded["labels"][row] if label != -100])


@pytest.fixture
def adapter(network, tokens):
    return CausalLMAdapter(network, tokens)


def test_the_loss_is_that_of_the_completion_one_row_at_a_time(adapter, tokens, rows):
    losses = adapter.loss(adapter.model, adapter.collate(adapter.encode(rows[:])))
    for row, loss in zip(rows, losses, strict=True):
        before, ids = (
            torch.tensor([tokens(text)["input_ids"]])
            for text in (row["prompt"], row["prompt"] + row["completion"] + "<end>")
        )
        logits = adapter.model(ids).logits[0, before.shape[1] - 1 : -1]
        torch.testing.assert_close(F.cross_entropy(logits, ids[0, before.shape[1] :], reduction="sum"), loss)


def test_without_a_prompt_every_token_but_the_first_counts(adapter, tokens, rows):
    encoded = adapter.encode({"text": ["It is Paris.", "Rome<end>"]})
    ids = [tokens(text)["input_ids"] for text in ("It is Paris.<end>", "Rome<end>")]
    assert encoded["input_ids"] == ids
    assert encoded["terms"] == [len(row) - 1 for row in ids]


def test_messages_are_the_chat_templates_and_the_last_answer_counts(adapter, tokens):
    talk = [{"role": "user", "content": "Peru?"}, {"role": "assistant", "content": "Lima"}]
    encoded = adapter.encode({"messages": [talk]})
    assert tokens.decode(encoded["input_ids"][0]) == "<|user|>Peru?<end><|assistant|>Lima<end>"
    assert counted_text(tokens, encoded, 0) == "Lima<end>"
    assert adapter.encode({"prompt": [talk[:1]], "completion": [talk[1:]]}) == encoded


def test_token_losses_stand_at_their_tokens_and_sum_to_the_loss(adapter, rows):
    batch = adapter.collate(adapter.encode(rows[:]))
    terms = adapter.term_losses(adapter.model, batch)
    assert terms.shape == batch["input_ids"].shape
    assert ((terms > 0) == (batch["labels"] != -100)).all()
    torch.testing.assert_close(adapter.loss(adapter.model, batch), terms.sum(1))


def test_the_side_on_which_the_tokenizer_pads_changes_no_score(network, tokens, rows):
    right, left = copy.deepcopy(tokens), copy.deepcopy(tokens)
    left.padding_side, left.pad_token = "left", "<end>"
    found = [ForwardInf(network, sided).trace(rows.select(range(2)), rows).scores for sided in (right, left)]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_a_batch_gives_the_losses_of_single_rows(network, tokens, rows):
    both = [
        ForwardInf(network, tokens, max_batch_length=length).trace(rows.select([0]), rows).scores
        for length in (1, 4096)
    ]
    np.testing.assert_allclose(*both, rtol=1e-3, atol=1e-5)


def test_a_long_row_loses_the_beginning_of_its_prompt(network, tokens, rows):
    adapter = CausalLMAdapter(network, tokens, max_length=8)
    (whole,) = CausalLMAdapter(network, tokens).encode(rows[:1])["input_ids"]
    encoded = adapter.encode({**rows[:1], "text": None})
    assert encoded["input_ids"] == [whole[-8:]]
    assert encoded["truncated"] == ["beginning"]
    text = adapter.encode({"text": ["What is the capital of France? It is Paris."]})
    assert text["input_ids"] == [tokens("What is the capital of France? It is Paris.")["input_ids"][:8]]


def test_a_span_counts_alone(adapter, tokens, rows):
    first = {**rows[:1], "span": ["Paris"]}
    encoded = adapter.encode(first)
    assert counted_text(tokens, encoded, 0).strip() == "Paris"
    inside = torch.tensor(encoded["labels"][0]) != -100
    whole, part = (
        adapter.term_losses(adapter.model, adapter.collate(adapter.encode(one)))[0] for one in (rows[:1], first)
    )
    torch.testing.assert_close(part, torch.where(inside, whole, 0))
    wrong = adapter.encode({**rows[:1], "span": ["France"]})
    assert wrong["unreadable"] == ["the span 'France' is not in the completion ' It is Paris.<end>'"]


def test_generated_answers_are_traced(network, tokens, rows):
    tracer = ForwardInf(network, tokens)
    found = tracer.trace_generation(rows["prompt"][:2], rows)
    assert found.queries["completion"] == tracer.adapter.answer(rows[:2])
    explained = tracer.explain(found, k=1).details[0]
    row = rows[explained["candidate"]]
    assert "".join(explained["terms"]) == row["prompt"] + row["completion"] + "<end>"


def test_the_first_half_of_the_blocks_is_run_once_for_all_queries(network, tokens, rows, tmp_path):
    adapter = CausalLMAdapter(network, tokens)
    batch = adapter.collate(adapter.encode(rows[:]))
    before = state(network)
    with torch.no_grad():
        half = adapter.run_shared(batch)
        torch.testing.assert_close(adapter.loss(network, half), adapter.loss(network, batch))
    late = [name for name, _ in network.named_parameters() if name not in adapter.shared_parameters()]
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    after = {name for name in late if ".1." not in name}
    norm = (
        {"model.norm.weight"}
        if "model.norm.weight" in before["parameters"]
        else {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    )
    assert after == (norm if tied else norm | {"lm_head.weight"})
    tracer = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", modules=late, radius=0.1))
    found = tracer.trace(rows.select(range(3)), rows)
    adapter.blocks.before_middle = set(before["parameters"])  # now nothing may be run before
    whole = tracer.with_options(cache_dir=tmp_path / "other").trace(rows.select(range(3)), rows)
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-4, atol=1e-5)
    assert_same_state(before, state(network))


def test_answers_do_not_depend_on_their_neighbours(adapter, rows):
    together = adapter.answer(rows[:], max_new_tokens=6)
    alone = [adapter.answer(rows[i : i + 1], max_new_tokens=6)[0] for i in range(len(rows))]
    assert together == alone


def test_it_is_traced_by_every_attributor(network, tokens, rows):
    before = state(network)
    for attributor in (
        ForwardInf(network, tokens, ascent=AscentConfig(direction="gradient", radius=0.1)),
        ForwardInf(network, tokens, ascent=AscentConfig(radius=0.1, direction="cg", iterations=3)),
        ForwardInf(network, tokens, ascent=AscentConfig(radius=0.1, direction="ekfac")),
        TracIn(network, tokens, similarity="cosine"),
        TrackStar(network, tokens),
        InfluenceFunctions(network, tokens, iterations=3),
        RepresentationSimilarity(network, tokens),
    ):
        found = attributor.trace(rows.select([1]), rows)
        assert np.isfinite(found.scores).all(), attributor.name
        assert found.scores[0, 1] > 0, attributor.name
        if attributor.name in ("tracin_cosine", "trackstar", "representation"):  # cosines
            assert found.ranking(0)[0] == 1, attributor.name
    assert_same_state(before, state(network))


def test_of_a_peft_model_what_it_has_trained_is_perturbed(network, tokens, rows):
    targets = ["c_attn"] if isinstance(network, GPT2LMHeadModel) else ["q_proj", "v_proj"]
    tuned = get_peft_model(network, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    adapter = adapter_for(tuned, tokens)
    names = perturbed_names(adapter, None)
    assert names
    assert all("lora_" in name for name in names)
    before = state(tuned)
    found = ForwardInf(tuned, tokens, ascent=AscentConfig(direction="gradient", radius=0.1)).trace(
        rows.select([2]), rows
    )
    assert found.scores[0, 2] > 0
    assert_same_state(before, state(tuned))


def test_of_a_peft_model_tokens_that_fall_count_a_quarter(network, tokens):
    targets = ["c_attn"] if isinstance(network, GPT2LMHeadModel) else ["q_proj", "v_proj"]
    plain = ForwardInf(network, tokens)
    assert (plain.falls, plain.ascent.damping) == (1, 0.01)
    tuned = get_peft_model(network, LoraConfig(r=2, target_modules=targets)).eval()
    tracer = ForwardInf(tuned, tokens)
    assert (tracer.falls, tracer.ascent.damping) == (0.25, 0.003)
    assert tracer.with_options(falls=1).falls == 1
    # After a descent, what has fallen counts fully.
    assert ForwardInf(tuned, tokens, ascent=AscentConfig(direction="gradient", mode="descent")).falls == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subject": ["?"]}, "`prompt` and `completion`; `text`; or `input_ids`; these have subject"),
        ({"prompt": ["Peru?", "Cuba?"], "completion": ["Lima", " "]}, "Nothing to predict in queries row 1"),
        ({"text": [""]}, "Nothing to predict in queries row 0"),
    ],
)
def test_rows_that_cannot_be_used_are_told(network, tokens, rows, given, message):
    with pytest.raises(ValueError, match=message):
        ForwardInf(network, tokens).trace(Dataset.from_dict(given), rows)


def test_other_models_are_refused(tokens, network):
    masked = BertForMaskedLM(
        BertConfig(vocab_size=9, num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(TypeError, match="BertForMaskedLM does not predict the next token"):
        CausalLMAdapter(masked, tokens)
    with pytest.raises(TypeError, match="needs its tokenizer"):
        CausalLMAdapter(network, None)
