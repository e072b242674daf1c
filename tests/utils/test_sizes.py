import pytest

from hf_forward_inf.utils.sizes import parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"), [("10GB", 10**10), ("1.5 mb", 1_500_000), ("2k", 2000), ("7", 7), ("0B", 0)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


def test_what_is_no_size_is_refused():
    with pytest.raises(ValueError, match="'ten' is no size: give one such as 500MB or 10GB"):
        parse_size("ten")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (123_456_789, "123 MB"), (2.5e12, "2.5 TB")]
)
def test_sizes_are_written_for_people(size, text):
    assert size_text(size) == text
