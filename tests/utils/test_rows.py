from hf_forward_inf.utils.rows import LAYOUTS, fill_in, text_and_target, text_columns, without_sentinels


def test_targets_go_to_their_places():
    text = "<extra_id_0> was born in <extra_id_1>."
    assert fill_in(text, "<extra_id_0> Ada <extra_id_1> London") == "Ada was born in London."


def test_a_place_without_a_span_stays():
    assert fill_in("<extra_id_0> and <extra_id_1>", "<extra_id_0> this") == "this and <extra_id_1>"


def test_a_target_without_sentinels_is_appended():
    assert fill_in("Where is Rome?", "Italy") == "Where is Rome? Italy"


def test_plain_words():
    assert without_sentinels("<extra_id_0> New York") == "New York"


def test_rows_are_read_whatever_their_layout():
    talk = [{"role": "user", "content": "Peru?"}, {"role": "assistant", "content": "Lima"}]
    for row, columns in (
        ({"inputs_pretokenized": "Peru?", "targets_pretokenized": "Lima", "text": "no"}, LAYOUTS[0]),
        ({"messages": talk}, ("messages",)),
        ({"prompt": talk[:1], "completion": "Lima"}, ("prompt", "completion")),
    ):
        assert text_columns(row) == columns
        assert text_and_target(row, columns) == ("Peru?", "Lima")
    assert text_and_target({"text": "Lima"}, ("text",)) == ("Lima", "")
    assert text_columns(["pixels"]) is None
