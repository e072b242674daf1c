from hf_forward_inf.utils.memory import Memory, once, unchanged


def test_the_values_used_last_stay():
    memory, computed = Memory[str](2), []

    def value(key):
        return memory.get(key, lambda: computed.append(key) or key.upper())

    assert [value(key) for key in "abacab"] == list("ABACAB")
    assert computed == ["a", "b", "c", "b"]


def test_what_does_not_change_is_computed_once():
    thing, calls = object(), []

    def count():
        calls.append(1)
        return len(calls)

    assert (once("number", thing, count), once("number", thing, count)) == (1, 2)
    with unchanged():
        assert {once("number", thing, count) for _ in range(3)} == {3}
        assert once("number", object(), count) == 4 and once("other", thing, count) == 5
        with unchanged():
            assert once("number", thing, count) == 3
    assert once("number", thing, count) == 6
