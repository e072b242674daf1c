from dataclasses import dataclass, field

import pytest

from hf_forward_inf.utils.options import RunOptions, argument_texts, check_fields, description


@dataclass
class Options(RunOptions):
    """What to do.

    With a word more.

    Args:
        num_rows (`int`, *optional*): Rows of the `table`, 100% of them
            if unset.
        shares (`dict[str, list[int]]`): Of ([`tables`]) something: each.
        relative (`bool`, *optional*): Whether it is relative.

    Raises:
        ValueError: Never.
    """

    num_rows: int | None = field(default=None, metadata={"min": 2})
    shares: list[float] = field(default_factory=list, metadata={"above": 0, "below": 1})
    relative: bool | None = None
    colour: str = field(default="red", metadata={"choices": ("red", "blue"), "help": "Its own help."})


def test_help_comes_from_the_docstrings_of_a_class_and_its_bases():
    texts = argument_texts(Options)
    assert texts["num_rows"] == "Rows of the table, 100% of them if unset."
    assert texts["shares"] == "Of something: each."
    assert texts["top_k"] == argument_texts(RunOptions)["top_k"]
    assert "ValueError" not in texts
    assert description(Options) == "What to do.\n\nWith a word more."


def test_messages_in_python_name_the_field_alone():
    options = RunOptions()
    options.top_k = 0
    with pytest.raises(ValueError, match=r"^top_k must be at least 1, not 0"):
        check_fields(options)
