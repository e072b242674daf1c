"""Conversations become the tokens that TRL trains on, and the same of them count."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from hf_forward_inf.adapters import CausalLMAdapter
from tests.helpers.causal import SIZE
from tests.helpers.templates import TEMPLATES, chat_tokens, template

TURNS = ["What is the capital of Peru?", "Lima.", "And of Cuba?", "It is Havana.", "Thanks.", " You are welcome. "]
CONVERSATIONS = [
    [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, TURNS[:length], strict=False)]
    for length in (2, 4, 6)
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
THOUGHT = "<think>\nWhich is it?\n</think>\n\n"
WITHOUT_SYSTEM = ("llama-2", "mistral", "gemma", "deepseek-r1", "command-r")


def conversations(family):
    """What a family's template can render."""
    others = []
    if family not in WITHOUT_SYSTEM:
        others += [[*SYSTEM, *talk] for talk in CONVERSATIONS]
    if family in ("qwen3", "deepseek-r1"):
        thinking = copy.deepcopy(CONVERSATIONS[1])
        for message in thinking[1::2]:
            message["content"] = THOUGHT + message["content"]
        others += [thinking, thinking[:2]]
    return CONVERSATIONS + others


@pytest.fixture(scope="module")
def tokens():
    return chat_tokens()


@pytest.fixture(scope="module")
def network(tokens):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tokens), **{**SIZE, "max_position_embeddings": 256})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def adapter_of(network, tokens):
    def make(chat_template, **options):
        own = copy.deepcopy(tokens)
        own.chat_template = chat_template
        return CausalLMAdapter(network, own, **options)

    return make


def trained_on(network, tokens, rows, **options):
    """The tokens and labels that TRL's trainer makes of rows."""
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **options)
    trainer = trl.SFTTrainer(network, args=arguments, train_dataset=rows, processing_class=copy.deepcopy(tokens))
    # TRL counts the first token too, which nothing predicts.
    return trainer.train_dataset["input_ids"][:], [[-100, *row[1:]] for row in trainer.train_dataset["labels"]]


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_tokens_that_count_are_those_that_trl_trains_on(adapter_of, network, family, marked):
    reference, adapter = adapter_of(template(family, True)).tokenizer, adapter_of(template(family, marked))
    rows = Dataset.from_dict({"messages": conversations(family)})
    encoded = adapter.encode(rows[:])
    assert not any(encoded["unreadable"])
    expected = trained_on(network, reference, rows, assistant_only_loss=True)
    assert (encoded["input_ids"], encoded["labels"]) == expected


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompts_and_completions_are_those_that_trl_trains_on(adapter_of, network, family):
    adapter = adapter_of(template(family, False))
    talks = conversations(family)
    rows = Dataset.from_dict({"prompt": [t[:-1] for t in talks], "completion": [t[-1:] for t in talks]})
    encoded = adapter.encode(rows[:])
    assert (encoded["input_ids"], encoded["labels"]) == trained_on(network, adapter.tokenizer, rows)


def test_texts_are_those_that_trl_trains_on(adapter_of, network):
    adapter = adapter_of(None)
    pairs = {"prompt": ["The capital is", "What", "Be "], "completion": [" Lima.", "ever", "brief.</s>"]}
    for columns in (pairs, {"text": ["The capital is Lima.", "Thanks.</s>"]}):
        encoded = adapter.encode(columns)
        expected = trained_on(network, adapter.tokenizer, Dataset.from_dict(columns))
        assert (encoded["input_ids"], encoded["labels"]) == expected


def test_the_last_turn_counts_alone_where_asked_for(adapter_of):
    for marked in (True, False):
        adapter = adapter_of(template("chatml", marked), turns="last")
        (labels,) = adapter.encode({"messages": CONVERSATIONS[1:2]})["labels"]
        assert adapter.tokenizer.decode([label for label in labels if label != -100]) == "It is Havana.<|im_end|>\n"
    with pytest.raises(ValueError, match="turns='first' must be 'all' or 'last'"):
        adapter_of(None, turns="first")


def test_tools_and_options_of_the_template_are_rendered_as_trl_renders_them(adapter_of, network):
    tools = [[{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}]
             for name in ("search", "weather")]  # fmt: skip
    talks = CONVERSATIONS[:2]
    for given in (tools, [json.dumps(one) for one in tools]):
        adapter = adapter_of(template("qwen2.5", True))
        rows = Dataset.from_dict({"messages": talks, "tools": given})
        encoded = adapter.encode(rows[:])
        expected = trained_on(network, adapter.tokenizer, rows, assistant_only_loss=True)
        assert (encoded["input_ids"], encoded["labels"]) == expected
        assert "weather" in adapter.tokenizer.decode(encoded["input_ids"][1])
    adapter = adapter_of(template("qwen3", False))
    sides = {"prompt": [talk[:-1] for talk in talks], "completion": [talk[-1:] for talk in talks]}
    rows = Dataset.from_dict({**sides, "chat_template_kwargs": [{"enable_thinking": False}] * 2})
    encoded = adapter.encode(rows[:])
    assert (encoded["input_ids"], encoded["labels"]) == trained_on(network, adapter.tokenizer, rows)
    assert [row[-1] for row in encoded["labels"]] == [row[-1] for row in encoded["input_ids"]]


def test_nulls_that_arrow_adds_to_tool_calls_are_not_rendered(adapter_of):
    calls = [[{"function": {"name": "capital", "arguments": {"of": "Peru"}}}],
             [{"function": {"name": "sum", "arguments": {"a": 1, "b": 2}}}]]  # fmt: skip
    talks = [[*CONVERSATIONS[0][:1], {"role": "assistant", "content": "", "tool_calls": call}] for call in calls]
    adapter = adapter_of(template("qwen2.5", False))
    rows = Dataset.from_dict({"messages": talks})
    assert rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"of": "Peru", "a": None, "b": None}
    together = adapter.encode(rows[:])
    alone = [adapter.encode({"messages": [talk]}) for talk in talks]
    assert together["input_ids"] == [one["input_ids"][0] for one in alone]
    assert together["labels"] == [one["labels"][0] for one in alone]


@pytest.mark.parametrize("family", sorted(set(TEMPLATES) - {"gemma", "llama-2"}))
def test_an_assistant_that_speaks_first_is_counted_as_trl_counts_it(adapter_of, network, family):
    reference, adapter = adapter_of(template(family, True)).tokenizer, adapter_of(template(family, False))
    talk = [{"role": "assistant", "content": "Hello."}, *CONVERSATIONS[0]]
    calls = [*CONVERSATIONS[0], {"role": "assistant", "content": "Or Cuzco."}]
    rows = Dataset.from_dict({"messages": [talk, calls, talk[:-1]]})
    encoded = adapter.encode(rows[:])
    expected = trained_on(network, reference, rows, assistant_only_loss=True)
    assert (encoded["input_ids"], encoded["labels"]) == expected
