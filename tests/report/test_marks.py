from hf_forward_inf.report.marks import Heat, cut, marked, words
from hf_forward_inf.report.texts import Piece


def shown(spans):
    return [(span.text, span.heat) for span in spans]


def test_tokens_are_found_again_in_a_text_whatever_the_spaces_between_them():
    heat = Heat({"terms": ["<s>", " Clean", "\n the", " rim", "</s>"], "term_scores": [9.0, 0.0, 2.0, 4.0, 9.0]})
    assert shown(marked([Piece("Clean  the rim", False)], heat)) == [("Clean  ", 0), ("the", 3), (" ", 0), ("rim", 4)]


def test_of_targets_alone_the_answer_is_marked():
    heat = Heat({"terms": ["<extra_id_0>", " New", " York", "</s>"], "term_scores": [5.0, 1.0, 0.3, 1.0]})
    pieces = [Piece("New York? No: ", False), Piece("New York", True), Piece(".", False)]
    spans = marked(pieces, heat)
    assert [(span.text, span.answer, span.heat) for span in spans] == [
        ("New York? No: ", False, 0), ("New", True, 4), (" ", True, 0), ("York", True, 2), (".", False, 0),
    ]  # fmt: skip
    assert spans[1].score == 1.0


def test_a_text_that_holds_none_of_the_tokens_is_not_heated():
    heat = Heat({"terms": ["other"], "term_scores": [1.0]})
    assert shown(marked([Piece("text", False)], heat)) == [("text", 0)]
    assert shown(heat.spans()) == [("other", 4)]


def test_heat_is_a_share_of_the_hottest_token_of_all_rows():
    heat = Heat({"terms": ["cold", " warm"], "term_scores": [0.01, 3.0]}, highest=10.0)
    assert shown(marked([Piece("cold warm", False)], heat)) == [("cold ", 0), ("warm", 2)]
    assert not heat.is_lost and Heat({"terms": ["a"], "term_scores": [1.0]}).is_lost


def test_whole_words_that_mean_something_are_shared():
    assert words("The capital of Peru, in 7 words") == {"capital", "peru", "7", "words"}
    spans = marked([Piece("Peruvian PERU is in Peru", False)], Heat(None), {"peru"})
    assert [span.text for span in spans if span.shared] == ["PERU", "Peru"]


def test_a_long_text_is_cut_at_a_space_and_nothing_is_lost():
    spans = marked([Piece("word " * 100, False), Piece("end", True)], Heat(None))
    first, rest = cut(spans, 52)
    assert "".join(span.text for span in first) == "word " * 10
    assert "".join(span.text for span in first + rest) == "word " * 100 + "end"
    assert cut(spans, 450) == (spans, [])
