import pytest

from hf_forward_inf.adapters import CausalLMAdapter, Seq2SeqAdapter
from hf_forward_inf.adapters.tokens import Tokens
from tests.helpers.causal import questions, train_tokens, untrained


@pytest.fixture
def calls(monkeypatch):
    """What the tokenizer was called with."""
    made, texts = Tokens._made, []
    monkeypatch.setattr(Tokens, "_made", lambda self, given: texts.append(given) or made(self, given))
    return texts


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("text",)])
def test_rows_of_texts_are_tokenized_by_one_call_and_as_each_alone(columns, calls):
    tokens = train_tokens()
    adapter = CausalLMAdapter(untrained("llama", len(tokens)), tokens)
    asked = questions()[:]
    pairs = [*zip(asked["prompt"], asked["completion"], strict=True), ("", " Rome"), ("Who?", "<end>"), ("Who?", "")]
    values = zip(*pairs, strict=True) if len(columns) == 2 else [[prompt + answer for prompt, answer in pairs]]
    rows = dict(zip(columns, map(list, values), strict=True))
    together = adapter.encode(rows)
    assert len(calls) == 1
    alone = [adapter.encode({name: [column[i]] for name, column in rows.items()}) for i in range(len(pairs))]
    assert together == {name: [one[name][0] for one in alone] for name in together}
    for prompt, ids in zip(rows[columns[0]], together["input_ids"], strict=True):
        assert tokens.decode(ids).startswith(prompt)


def test_inputs_and_targets_are_tokenized_by_one_call_each(model, tokenizer, candidates, calls):
    adapter = Seq2SeqAdapter(model, tokenizer)
    together = adapter.encode(candidates[:20])
    assert len(calls) == 2
    assert together == {name: [adapter.encode(candidates[i : i + 1])[name][0] for i in range(20)] for name in together}


def test_half_a_character_spoils_its_own_row_alone():
    tokens = Tokens(train_tokens())
    with tokens.together(["Rome", "\ud800"]):
        assert tokens("Rome") == Tokens(train_tokens())("Rome")
    assert tokens.known == {}
