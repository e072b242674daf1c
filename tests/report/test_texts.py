import json

import pytest

from hf_forward_inf.report.texts import answer, is_language, pieces, plain, question, shortened, turns

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": json.dumps(CHAT)},
        {"messages": CHAT[:1], "completion": "Hello."},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "extra": 1},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"},
        {"text": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>"},
        {"text": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"},
    ],
)  # fmt: skip
def test_conversations_are_read_in_every_form(row):
    assert [(turn.role, turn.text, turn.answer) for turn in turns(row)] == [
        ("user", "Hi", False), ("assistant", "Hello.", True),
    ]  # fmt: skip
    assert (question(row), answer(row), plain(row)) == ("Hi", "Hello.", "Hi\nHello.")


def test_a_question_has_a_blank_where_the_model_speaks():
    fact = {"inputs_pretokenized": "<extra_id_0> is in <extra_id_1>.", "targets_pretokenized": "<extra_id_0> Lima"}
    assert question(fact) == "____ is in ____."
    assert question({"prompt": "<s>Capital of Peru?", "completion": " Lima"}) == "Capital of Peru?"
    assert question({"text": "All of it"}) == "All of it"
    assert question({"sentence1": "One.", "sentence2": "Two.", "label": 1}) == "One.\nTwo."
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert question({"messages": asked}) == "Hi"


def test_a_system_prompt_is_no_part_of_the_plain_text_and_tool_calls_are_shown():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    row = {"messages": [{"role": "system", "content": "Be brief."}, CHAT[0], call]}
    assert plain(row) == 'Hi\n[tool calls: [{"name": "look"}]]'


def test_other_texts_are_no_conversations():
    assert turns({"text": "Just <b>text</b>"}) is None
    assert turns({"prompt": "a", "completion": "b"}) is None
    assert plain({"premise": "It rains.", "hypothesis": "It is wet.", "id": "x7"}) == "It rains.\nIt is wet."
    assert pieces({"label": 1}) == []


def test_sentinels_are_filled_in():
    row = {"inputs_pretokenized": "<extra_id_0> lies in Asia.", "targets_pretokenized": "<extra_id_0> New Delhi"}
    assert plain(row) == "New Delhi lies in Asia." and answer(row) == "New Delhi"


def test_rows_of_texts_are_a_language_models_and_labelled_or_drawn_ones_are_not():
    assert is_language(["prompt", "completion"]) and is_language(["messages", "images"])
    assert not is_language(["text", "label"]) and not is_language(["image", "caption"])


def test_a_long_line_ends_at_a_word():
    assert shortened("one two\nthree four", 15) == "one two three…" and shortened("one  two", 14) == "one two"
