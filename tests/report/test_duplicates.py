from hf_forward_inf.report.duplicates import stacked


def test_texts_that_say_nearly_the_same_are_one_group():
    long = "the quick brown fox jumps over the lazy dog and runs far away into the dark forest, which is old"
    texts = [long, "Another text", long.upper() + "!", long.replace("old", "cold"), "another TEXT.", "", ""]
    assert stacked(texts) == [[0, 2, 3], [1, 4], [5], [6]]


def test_short_sentences_about_different_things_are_not():
    texts = [f"The capital of {country} is {city}." for country, city in (("Peru", "Lima"), ("Chile", "Santiago"))]
    assert stacked(texts) == [[0], [1]]
