from dataclasses import dataclass, field

import pytest

from hf_forward_inf.utils.options import OptionParser, RunOptions, argument_texts, check_fields, description


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


@dataclass
class Others:
    """Others.

    Args:
        seed (`int`): Another text for the same option.
        width (`int`): How wide.
    """

    seed: int = 0
    width: int = 1


def test_help_comes_from_the_docstrings_of_a_class_and_its_bases():
    texts = argument_texts(Options)
    assert texts["num_rows"] == "Rows of the table, 100% of them if unset."
    assert texts["shares"] == "Of (tables) something: each."
    assert texts["top_k"] == argument_texts(RunOptions)["top_k"]
    assert "ValueError" not in texts
    assert description(Options) == "What to do.\n\nWith a word more."


def test_the_parser_shows_texts_and_defaults_that_say_something():
    shown = " ".join(OptionParser(Options).format_help().split())
    assert "--num_rows NUM_ROWS, --num-rows NUM_ROWS Rows of the table, 100% of them if unset. --" in shown
    assert "Its own help. (default: red)" in shown


@pytest.mark.parametrize("word", ["--num_rows", "--num-rows"])
def test_both_spellings_are_one_option(word):
    (options,) = OptionParser(Options).parse([word, "3"])
    assert options.num_rows == 3


def test_an_option_of_several_dataclasses_is_given_to_all():
    options, others = OptionParser(Options, Others).parse(["--seed", "5", "--width", "2"])
    assert (options.seed, others.seed, others.width) == (5, 5, 2)


def test_an_optional_switch_needs_no_value_and_is_unset_without():
    assert [
        OptionParser(Options).parse(words)[0].relative for words in ([], ["--relative"], ["--relative", "no"])
    ] == [
        None,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_rows", "1"], "--num_rows must be at least 2, not 1."),
        (["--shares", "0.5", "1"], "--shares must be below 1, not 1.0."),
        (["--shares", "nan"], "--shares must be above 0, not nan."),
        (["--colour", "green"], "--colour must be one of red, blue, not 'green'."),
        (["--num", "2"], "unrecognized arguments"),
    ],
)
def test_values_outside_their_limits_are_refused_in_a_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        OptionParser(Options).parse(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_messages_in_python_name_the_field_alone():
    options = RunOptions()
    options.top_k = 0
    with pytest.raises(ValueError, match=r"^top_k must be at least 1, not 0"):
        check_fields(options)
