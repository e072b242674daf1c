"""What a model generated is what is traced, token by token."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter, Seq2SeqAdapter
from hf_forward_inf.ascent.parameters import names_for
from tests.helpers.causal import SIZE
from tests.helpers.templates import chat_tokens, template

GRADIENT = AscentConfig(direction="gradient", radius=0.1)
TEXTS = ["The capital of Peru is Lima.", "The capital of Cuba is Havana.", "What is the capital of Kenya? Nairobi."]
USER = {"role": "user", "content": "What is the capital of Peru?"}


def metaspace_tokens():
    """As of Llama 2: a space is part of the word behind it, and the decoder drops the first of a text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def network_for(tokens, kind="llama", **options):
    torch.manual_seed(0)
    given = {"vocab_size": len(tokens), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**given, **SIZE, "max_position_embeddings": 64, **options})
    return AutoModelForCausalLM.from_config(config).eval()


def said(network, asked, count):
    """What the model generates after some tokens, by plain forward passes."""
    ids = list(asked)
    for _ in range(count):
        ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids


def loss_of(network, ids, start):
    logits = network(torch.tensor([ids])).logits[0, start - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum")


def plain_scores(network, names, query, rows, radius):
    """Algorithm 1 without this library: one normalised step along the gradient of the query's loss."""
    network = copy.deepcopy(network)
    parameters = [network.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(loss_of(network, *query), parameters)
    step = radius / torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        before = torch.stack([loss_of(network, *row) for row in rows])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter += step * gradient
        return (torch.stack([loss_of(network, *row) for row in rows]) - before).numpy()


@pytest.mark.parametrize("make", [chat_tokens, metaspace_tokens], ids=["byte level", "metaspace"])
def test_scores_of_an_answer_are_those_of_the_generated_tokens(make):
    tokens = make()
    network = network_for(tokens)
    rows = Dataset.from_dict({"text": TEXTS})
    tracer = ForwardInf(network, tokens, ascent=GRADIENT)
    found = tracer.trace_generation("The capital of Peru", rows, max_new_tokens=5)
    asked = tokens("The capital of Peru")["input_ids"]
    ids = said(network, asked, 5)
    assert found.queries["output_ids"] == [ids[len(asked) :]]
    candidates = [([*tokens(text)["input_ids"], 2], 1) for text in TEXTS]
    expected = plain_scores(network, names_for(tracer.adapter, tracer.ascent), (ids, len(asked)), candidates, 0.1)
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-3, atol=1e-5)


def test_an_answer_that_was_cut_off_has_no_end_token_and_a_finished_one_has_its_own():
    tokens = chat_tokens()
    network = network_for(tokens)
    adapter = CausalLMAdapter(network, tokens)
    asked = Dataset.from_dict({"prompt": ["The capital of Peru is"]})
    encoded = adapter.encode(adapter.with_answers(asked, max_new_tokens=3)[:])
    assert encoded["terms"] == [3]
    assert encoded["input_ids"][0][-1] != tokens.eos_token_id
    with torch.no_grad():
        network.lm_head.weight[:] = 0
        network.lm_head.weight[2] = network.model(torch.tensor([tokens(asked[0]["prompt"])["input_ids"]]))[0][0, -1]
    encoded = adapter.encode(adapter.with_answers(asked, max_new_tokens=3)[:])
    assert [label for label in encoded["labels"][0] if label != -100] == [tokens.eos_token_id]


def test_special_tokens_inside_an_answer_are_traced(monkeypatch):
    tokens = chat_tokens()
    network = network_for(tokens)
    answer = tokens("<think>Peru</think> Lima</s>", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(
        network, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[*answer, 0, 0]])], 1)
    )
    adapter = CausalLMAdapter(network, tokens)
    query = adapter.with_answers(Dataset.from_dict({"prompt": ["Of Peru?"]}))
    assert query["completion"] == ["Peru Lima"]
    encoded = adapter.encode(query[:])
    assert [label for label in encoded["labels"][0] if label != -100] == answer


def test_an_answer_keeps_its_first_space():
    tokens = metaspace_tokens()
    network = network_for(tokens)
    answer = tokens("The capital is Lima.")["input_ids"][len(tokens("The capital is")["input_ids"]) :]
    network.generate = lambda input_ids, **_: torch.cat([input_ids, torch.tensor([answer])], 1)
    query = CausalLMAdapter(network, tokens).with_answers(Dataset.from_dict({"prompt": ["The capital is"]}))
    assert query["completion"] == [" Lima."]


def test_a_conversation_that_ends_with_the_users_turn_is_answered_and_traced():
    tokens = chat_tokens(template("chatml", False))
    network = network_for(tokens)
    tracer = ForwardInf(network, tokens, ascent=GRADIENT)
    finished = [USER, {"role": "assistant", "content": "Lima."}]
    rows = Dataset.from_dict({"messages": [finished]})
    asked = tokens.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    ids = said(network, asked, 64 - len(asked))  # to the limit of 64 tokens
    queries = Dataset.from_dict({"messages": [[USER], finished]})
    found = tracer.trace(queries, rows)
    assert found.queries["output_ids"] == [ids[len(asked) :], None]
    assert [talk[-1]["role"] for talk in found.queries["messages"]] == ["assistant"] * 2
    encoded = tracer.adapter.encode(found.queries[:])
    assert encoded["input_ids"][0] == ids
    assert encoded["input_ids"][1] == tokens.apply_chat_template(finished)["input_ids"]
    alone = tracer.trace(Dataset.from_dict({"messages": [finished]}), rows)
    np.testing.assert_allclose(found.scores[1], alone.scores[0], rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_texts_and_conversations_are_asked_alike_by_trace_generation_and_the_pipeline():
    tokens = chat_tokens(template("chatml", False))
    network = network_for(tokens)
    rows = Dataset.from_dict({"messages": [[USER, {"role": "assistant", "content": "Lima."}]]})
    tracer = ForwardInf(network, tokens, ascent=GRADIENT)
    pipe = pipeline(
        "data-attribution", model=network, tokenizer=copy.deepcopy(tokens), candidates=rows, ascent=GRADIENT
    )
    asked = Dataset.from_dict({"messages": [[USER]]})
    (expected,) = tracer.trace(asked, rows).scores
    text = USER["content"]
    for one in (text, [USER]):
        np.testing.assert_allclose(tracer.trace_generation(one, rows).scores, [expected], rtol=1e-4)
        assert pipe(one)[0]["score"] == pytest.approx(expected[0], rel=1e-4)
        both = pipe([one, one])
        assert [len(both), both[1][0]["score"]] == [2, pytest.approx(expected[0], rel=1e-4)]
    assert tracer.trace_generation([text, [USER]], rows).scores.shape == (2, 1)
    row = {"messages": [USER]}
    assert pipe(row)[0]["score"] == pytest.approx(expected[0], rel=1e-4)


def test_a_text_is_the_users_turn_among_conversations_and_is_continued_among_texts():
    tokens = chat_tokens(template("chatml", False))
    adapter = CausalLMAdapter(network_for(tokens), tokens)
    talks, texts, pairs = (
        Dataset.from_dict(columns)
        for columns in (
            {"messages": [[USER, USER]]},
            {"text": ["Lima"]},
            {"prompt": ["Peru?"], "completion": ["Lima"]},
        )
    )
    with pytest.warns(UserWarning, match="asked as the user's turn"):
        assert adapter.rows_for("Peru?", talks) == {"messages": [[{"role": "user", "content": "Peru?"}]]}
    for plain in (texts, pairs):
        assert adapter.rows_for("Peru?", plain) == {"prompt": ["Peru?"]}
    with pytest.raises(TypeError, match="must be of one kind"):
        adapter.rows_for(["Peru?", {"prompt": "Peru?"}], texts)


def test_an_answer_that_was_changed_by_hand_is_refused():
    tokens = chat_tokens()
    tracer = ForwardInf(network_for(tokens), tokens, ascent=GRADIENT)
    rows = Dataset.from_dict({"text": TEXTS})
    answered = tracer.adapter.with_answers(Dataset.from_dict({"prompt": ["Peru"]}), max_new_tokens=3)
    changed = answered.remove_columns("completion").add_column("completion", [" Lima"])
    with pytest.raises(ValueError, match="`output_ids` and the answer's text ' Lima' differ"):
        tracer.trace(changed, rows)
    assert np.isfinite(tracer.trace(changed.remove_columns("output_ids"), rows).scores).all()


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_and_a_long_one_is_cut_off_by_the_model():
    tokens = chat_tokens()
    adapter = CausalLMAdapter(network_for(tokens), tokens)
    with pytest.raises(ValueError, match="No room for an answer in queries row 1"):
        adapter.with_answers(Dataset.from_dict({"prompt": ["Peru", "Peru " * 90]}))
    long = " ".join(["Peru"] * 8)
    (answer,) = adapter.with_answers(Dataset.from_dict({"prompt": [long]}))["output_ids"]
    assert len(answer) == 64 - len(tokens(long)["input_ids"])


def test_a_seq2seq_answer_is_traced_as_it_was_generated(model, tokenizer, candidates):
    adapter = Seq2SeqAdapter(model, tokenizer)
    asked = Dataset.from_dict({"inputs_pretokenized": ["The capital of Peru is <extra_id_0>."]})
    answered = adapter.with_answers(asked, max_new_tokens=4)
    ids = torch.tensor([tokenizer(asked[0]["inputs_pretokenized"])["input_ids"]])
    expected = [0]
    while len(expected) < 5 and expected[-1] != 1:
        expected.append(int(model(input_ids=ids, decoder_input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert answered["output_ids"] == [expected[1:]]
    encoded = adapter.encode(answered[:])
    assert (encoded["labels"], encoded["decoder_input_ids"]) == ([expected[1:]], [expected[:-1]])
    found = ForwardInf(model, tokenizer, ascent=GRADIENT).trace(asked, candidates.select(range(3)))
    assert found.queries["output_ids"][0][:4] == expected[1:]
