from dataclasses import dataclass, field
from typing import Literal

import pytest

from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.parser import OptionParser


@dataclass(kw_only=True)
class Options(RunOptions):
    """What to do.

    Args:
        rows (`str`): Where rows are.
        num_rows (`int`, *optional*): Rows of the `table`, 100% of them
            if unset.
        shares (`list[float]`): Of something: each.
        relative (`bool`, *optional*): Whether it is relative.
        baselines (`bool`, defaults to `True`): Also run others.
        kind (`str`): Of them.
    """

    rows: str
    num_rows: int | None = field(default=None, metadata={"min": 2})
    shares: list[float] = field(default_factory=list, metadata={"above": 0, "below": 1})
    relative: bool | None = None
    baselines: bool = True
    colour: str = field(default="red", metadata={"choices": ("red", "blue"), "help": "Its own help."})
    kind: Literal["a", "b"] | None = None


@dataclass
class Others:
    """How wide (and not how high).

    Args:
        seed (`int`): Another text for the same option.
        width (`int`): How wide.
    """

    seed: int = 0
    width: int = 1


def parsed(*words, kinds=(Options,)):
    return OptionParser(*kinds, prog="run").parse(["--rows", "r", *words])[0]


def test_help_shows_texts_and_defaults_that_say_something_what_must_be_given_first():
    shown = " ".join(OptionParser(Options, Others, prog="run").format_help().split())
    assert shown.startswith("usage: run --rows TEXT [options] What to do. options: --rows TEXT Where rows are.")
    assert "--num_rows N Rows of the table, 100% of them if unset. --" in shown
    assert "Its own help. (default: red)" in shown
    assert "--no_baselines Do not also run others." in shown
    assert "How wide: --width N" in shown
    assert shown.count("--seed") == 1


@pytest.mark.parametrize("word", ["--num_rows", "--num-rows"])
def test_both_spellings_are_one_option(word):
    assert parsed(word, "3")[0].num_rows == 3
    assert parsed(f"{word}=4")[0].num_rows == 4


def test_an_option_of_several_dataclasses_is_given_to_all():
    options, others = parsed("--seed", "5", "--width", "2", kinds=(Options, Others))
    assert (options.seed, others.seed, others.width) == (5, 5, 2)


def test_a_switch_needs_no_value_and_has_an_opposite():
    assert [parsed(*words)[0].relative for words in ([], ["--relative"], ["--no-relative"])] == [None, True, False]
    assert [parsed(*words)[0].baselines for words in ([], ["--no_baselines"])] == [True, False]


def test_a_config_file_sets_options_and_the_command_line_takes_precedence(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("num-rows: 3\nshares: [0.1, 0.5]\nbaselines: false\ncolour: blue\nkind: null\nrelative: true\n")
    (options,) = parsed("--config", str(file), "--num_rows", "7")
    assert (options.num_rows, options.shares, options.baselines) == (7, [0.1, 0.5], False)
    assert (options.colour, options.kind, options.relative) == ("blue", None, True)
    file.write_text("rows: from the file\n")
    (options,), _ = OptionParser(Options, prog="run").parse([f"--config={file}"])
    assert options.rows == "from the file"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("num_row: 3", "there is no option --num_row. Did you mean --num_rows?"),
        ("num_rows: 1", "--num_rows must be at least 2, not 1."),
        ("baselines: 3", "baselines must be true or false, not 3."),
        ("- rows", "must hold options by their names"),
        ("a: [", "can't be read"),
    ],
)
def test_a_config_file_that_is_wrong_is_refused_in_a_line(said, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(said)
    with pytest.raises(SystemExit) as stopped:
        parsed("--config", str(tmp_path / "run.yaml"))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_rows", "1"], "--num_rows must be at least 2, not 1."),
        (["--num_rows", "two"], "argument --num_rows: invalid int value: 'two'."),
        (["--shares", "0.5", "1"], "--shares must be below 1, not 1.0."),
        (["--shares", "nan"], "--shares must be above 0, not nan."),
        (["--colour", "green"], "--colour must be one of red, blue, not 'green'."),
        (["--kind", "c"], "invalid choice: 'c'"),
        (["--num", "2"], "there is no option --num."),
        (["--relativ"], "there is no option --relativ. Did you mean --relative?"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml can't be read"),
    ],
)
def test_values_outside_their_limits_are_refused_in_a_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*words)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed
    assert printed.endswith("run --help lists all options.\n")
