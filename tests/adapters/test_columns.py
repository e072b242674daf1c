"""Columns that people have: mapped where it is clear what they mean, refused by row or by name where it is not."""

import copy
import json
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.adapters.language import longest_input
from tests.helpers.causal import SIZE
from tests.helpers.templates import chat_tokens, template

TALK = [{"role": "user", "content": "Of Peru?"}, {"role": "assistant", "content": "Lima."}]
SHARED = [{"from": "human", "value": "Of Peru?"}, {"from": "gpt", "value": "Lima."}]


@pytest.fixture(scope="module")
def tokens():
    return chat_tokens(template("chatml", False))


@pytest.fixture(scope="module")
def network(tokens):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokens), **SIZE)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def adapter(network, tokens):
    return CausalLMAdapter(network, tokens)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"conversations": [SHARED]}, "`conversations` are read as messages"),
        ({"conversations": [TALK]}, "`conversations` are read as messages"),
        ({"question": ["Of Peru?"], "answer": ["Lima."]}, "`question` is read as the user's turn"),
        ({"instruction": ["Of Peru?"], "output": ["Lima."]}, "`instruction` is read as the user's turn"),
        ({"instruction": ["Of Peru?"], "input": [""], "output": ["Lima."]}, "`instruction` with `input` is read"),
        ({"messages": [SHARED]}, None),
        ({"messages": [json.dumps(TALK)]}, None),
        ({"messages": [[{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]]}, None),
    ],
)
def test_other_habits_are_read_as_messages_and_a_warning_says_so_once(network, tokens, columns, said):
    adapter = CausalLMAdapter(network, tokens)
    expected = adapter.encode({"messages": [TALK]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert adapter.encode(columns) == expected
        assert adapter.encode(columns) == expected
    assert [said in str(warning.message) for warning in caught] == ([True] if said else [])


def test_an_input_follows_its_instruction(adapter):
    with pytest.warns(UserWarning, match="`instruction` with `input`"):
        encoded = adapter.encode({"instruction": ["Where?"], "input": ["Peru"], "output": ["Lima."]})
    talk = [{"role": "user", "content": "Where?\n\nPeru"}, TALK[1]]
    assert encoded == adapter.encode({"messages": [talk]})


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"question": ["?"], "context": ["Peru"], "answer": ["Lima"]}, "how `context` enter the prompt is unclear"),
        ({"question": ["?"], "answer": ["a"], "instruction": ["?"], "output": ["b"]}, "these have question, answer"),
        ({"source": ["?"]}, "these have source"),
        ({"messages": ["Of Peru?"]}, "row 0: `messages` holds a text that is not JSON"),
        ({"messages": [TALK[0]]}, "row 0: `messages` must hold a list of messages, not dict"),
        ({"messages": [TALK, []]}, "row 1: `messages` holds no message"),
        ({"messages": [TALK[:1]]}, "row 0: the assistant says nothing in it"),
        ({"messages": [[{"from": "function_call", "value": "f"}]]}, "row 0: .* it needs `role` and `content`"),
        (
            {"messages": [[{"role": "user", "content": [{"type": "image"}]}]]},
            r"row 0: its messages hold parts that the adapter can't read \(image\)",
        ),
        ({"text": [["Of", "Peru"]]}, "row 0: `text` holds list where a text"),
        ({"text": [3]}, "row 0: `text` holds int where a text"),
        ({"prompt": ["?"], "completion": [["a", "b"]]}, "row 0: `completion` holds list where a text"),
        ({"input_ids": [[5, 6]], "labels": [[5]]}, "row 0: `labels` has 1 values for 2 tokens"),
        ({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 0, 1]]}, "row 0: `attention_mask` masks tokens between"),
        ({"input_ids": [[5, 10_000]]}, "row 0: token None has the id 10000 and the model"),
        ({"prompt": [TALK[:1]], "completion": [None]}, "row 0: `completion` is empty"),
        ({"text": ["Of Peru?"], "span": [3]}, "row 0: `span` holds int where a text must be"),
        ({"messages": [TALK], "tools": ["search"]}, "row 0: `tools` holds a text that is not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused_by_row(network, tokens, columns, reason):
    queries, rows = Dataset.from_dict({"text": ["Of Peru?"]}), Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=reason):
        ForwardInf(network, tokens).trace(queries, rows)


def test_questions_are_refused_where_no_template_joins_them_to_their_answers(network):
    with pytest.raises(ValueError, match="no chat template that says how `question` and `answer` are joined"):
        CausalLMAdapter(network, chat_tokens()).encode({"question": ["?"], "answer": ["Lima"]})
    encoded = CausalLMAdapter(network, chat_tokens()).encode({"messages": [TALK]})
    assert "has no chat template: set tokenizer.chat_template" in encoded["unreadable"][0]


def test_an_error_of_the_template_names_its_row(network, tokens):
    strict = copy.deepcopy(tokens)
    strict.chat_template = template("gemma", False)
    rows = Dataset.from_dict({"messages": [TALK, TALK[1:] + TALK[:1]]})
    with pytest.raises(ValueError, match=r"row 1: the chat template refuses it \(Roles must alternate\)"):
        ForwardInf(network, strict).trace(rows.select([0]), rows)


def test_a_template_that_moves_earlier_turns_is_refused_unless_the_last_turn_counts_alone(network, tokens):
    moving = copy.deepcopy(tokens)
    moving.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% if loop.index0 >= messages | length - 2 %}TOOLS {% endif %}USER {{ m.content }} "
        "{% else %}SAY {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}SAY {% endif %}"
    )
    (reason,) = CausalLMAdapter(network, moving).encode({"messages": [TALK * 2]})["unreadable"]
    assert "turns='last'" in reason
    (labels,) = CausalLMAdapter(network, moving, turns="last").encode({"messages": [TALK * 2]})["labels"]
    assert moving.decode([label for label in labels if label != -100]) == " Lima.</s>"


def test_tokens_are_taken_as_they_are(adapter):
    ids, labels = [1, 60, 61, 62], [-100, -100, 61, 62]
    padded = {"input_ids": [[*ids, 0, 0]], "labels": [[*labels, -100, -100]], "attention_mask": [[1] * 4 + [0, 0]]}
    for columns in ({"input_ids": [ids], "labels": [labels]}, padded):
        encoded = adapter.encode(columns)
        assert (encoded["input_ids"], encoded["labels"], encoded["terms"]) == ([ids], [labels], [2])
    assert adapter.encode({"input_ids": [ids]})["labels"] == [[-100, *ids[1:]]]
    assert adapter.encode({"input_ids": [ids], "completion_mask": [[0, 0, 1, 1]]})["labels"] == [labels]
    rows = Dataset.from_dict(padded).with_format("torch")
    text = adapter.encode(adapter.prepare(rows)[:])
    assert text["input_ids"] == [ids]


def test_queries_and_candidates_have_columns_of_their_own(network, tokens):
    tracer = ForwardInf(network, tokens, ascent=AscentConfig(direction="gradient", radius=0.1))
    query = Dataset.from_dict({"messages": [TALK]})
    found = tracer.trace(query, Dataset.from_dict({"text": ["Of Peru? Lima."], "id": [3]}))
    pairs = Dataset.from_dict({"prompt": [TALK[:1]], "completion": [TALK[1:]]})
    assert found.scores.shape == (1, 1)
    assert tracer.trace(pairs, query).scores == pytest.approx(tracer.trace(query, query).scores)


def test_two_begin_tokens_are_warned_of(adapter):
    with pytest.warns(UserWarning, match="Rows begin with two '<s>' tokens"):
        adapter.encode({"text": ["<s>Lima."]})


@pytest.mark.parametrize(
    ("columns", "lost"),
    [
        (
            {"text": ["Peru " * 90, "Lima", "Peru " * 80]},
            "of 3 rows, 2 lose their ends",
        ),
        ({"prompt": ["Peru " * 90], "completion": [" Lima"]}, "1 loses its beginning"),
        ({"prompt": ["Peru " * 90], "completion": [" Lima" * 90]}, "1 loses its beginning and 1 loses its end"),
    ],
)
def test_a_warning_says_how_many_rows_are_cut_and_at_which_end(network, tokens, columns, lost):
    tracer = ForwardInf(network, tokens, ascent=AscentConfig(direction="gradient", radius=0.1))
    with pytest.warns(UserWarning, match=lost):
        tracer.trace(Dataset.from_dict({"text": ["Lima"]}), Dataset.from_dict(columns))


def test_rows_are_cut_at_a_stated_limit_only(tokens):
    size = {**SIZE, "vocab_size": len(tokens)}
    mamba = AutoConfig.for_model("mamba", vocab_size=len(tokens), hidden_size=16, num_hidden_layers=1, state_size=4)
    unlimited = CausalLMAdapter(AutoModelForCausalLM.from_config(mamba), tokens)
    assert unlimited.max_length is None
    assert len(unlimited.encode({"text": ["a" * 3000]})["input_ids"][0]) == 3002
    llava = LlavaConfig(
        text_config={"model_type": "llama", **size, "max_position_embeddings": 96},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8,
                       "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8, "patch_size": 4},
    )  # fmt: skip
    assert longest_input(llava, tokens) == 96
    assert LlavaForConditionalGeneration.main_input_name == "input_ids"
    stated = copy.deepcopy(tokens)
    stated.model_max_length = 40
    assert longest_input(llava, stated) == 40
    bart = AutoConfig.for_model("led", max_encoder_position_embeddings=500, max_decoder_position_embeddings=50)
    assert [longest_input(bart, tokens, part) for part in ("encoder", "decoder")] == [500, 50]
