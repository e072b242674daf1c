import json
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.cli import COMMANDS, main, run_command
from hf_forward_inf.commands import options
from hf_forward_inf.utils.options import RunOptions, argument_texts
from hf_forward_inf.utils.processes import say


def imported_by(*words):
    """Modules of interest that a new process has imported after running some words of Python."""
    code = "\n".join(
        [*words, "import sys; print(*(m for m in ('torch', 'transformers.pipelines') if m in sys.modules))"]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines()[-1].split()


def test_the_command_without_a_command_shows_how_to_use_it(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: hf-forward-inf COMMAND")
    assert all(f"  {name} " in printed and command.summary in printed for name, command in COMMANDS.items())


def test_a_command_that_is_misspelt_is_guessed(capsys):
    assert main(["trac"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no command trac. Did you mean trace?\n")


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-forward-inf {version('hf-forward-inf')}\n"


def test_a_shell_completes_commands_and_options(capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    typed = "COMP_WORDS=(hf-forward-inf trace --can); COMP_CWORD=2; _shtab_hf_forward_inf; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", f"source {script}; {typed}"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["--candidates"], done.stderr
    assert main(["completion", "basic"]) == 2


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "hf_forward_inf", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: hf-forward-inf COMMAND")


@pytest.mark.parametrize("words", [["--help"], ["trace", "--help"], ["leakage", "--epochs", "0"]])
def test_help_and_wrong_options_need_no_torch(words):
    assert imported_by("from hf_forward_inf.cli import main", f"try: main({words})", "except SystemExit: pass") == []


def test_the_import_leaves_the_pipeline_to_transformers_own():
    assert imported_by("import hf_forward_inf") == []
    registered = "from transformers.pipelines import PIPELINE_REGISTRY as known; known.check_task('data-attribution')"
    for order in (
        ["import hf_forward_inf", registered],
        ["import transformers.pipelines, hf_forward_inf", registered],
    ):
        assert "transformers.pipelines" in imported_by(*order)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_its_help_in_a_docstring(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for kind in (getattr(options, name) for name in COMMANDS[command].options):
        for name, text in argument_texts(kind).items():
            field = kind.__dataclass_fields__[name]
            named = f"--{name} " in printed or f"--no_{name} " in printed or field.metadata.get("positional", False)
            assert named == field.init  # `compare` is always that of the command
            assert text.split()[0].lower() in printed.lower() or kind is AscentConfig
        assert argument_texts(kind).keys() == {*kind.__dataclass_fields__}


@pytest.mark.parametrize("error", [ValueError, OSError, NotImplementedError, FloatingPointError, MemoryError])
def test_errors_that_say_what_to_do_are_printed_in_one_line(error, capsys):
    def run(options, ascent):
        raise error("Do this instead.")

    assert run_command(run, RunOptions, AscentConfig, arguments=[]) == 1
    assert capsys.readouterr().err == "error: Do this instead.\n"


def test_an_import_that_fails_names_the_extra(capsys):
    def run(options):
        import a_package_that_is_not_there  # noqa: F401

    assert run_command(run, RunOptions, arguments=[], extra="truth") == 1
    assert "pip install 'hf-forward-inf[truth]'" in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_traceback():
    def run(options):
        raise AttributeError("a bug")

    with pytest.raises(AttributeError, match="a bug"):
        run_command(run, RunOptions, arguments=[])


def test_one_seed_is_given_to_the_run_and_to_its_ascent():
    seen = []
    assert run_command(lambda *given: seen.extend(given), RunOptions, AscentConfig, arguments=["--seed", "3"]) == 0
    assert [one.seed for one in seen] == [3, 3]


def test_the_result_is_all_that_json_prints(capsys):
    def run(options):
        say("Working ...")
        warnings.warn("Look here.", stacklevel=1)
        return {"figure": 1, "folder": Path("out")}

    with pytest.warns(UserWarning, match="Look here"):
        assert run_command(run, RunOptions, arguments=["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"figure": 1, "folder": "out"}
    with pytest.warns(UserWarning, match="Look here"):
        assert run_command(run, RunOptions, arguments=["--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_warning_is_a_line_without_code():
    code = "import warnings; from hf_forward_inf.cli import run_command; from hf_forward_inf.utils.options import *\n"
    code += "run_command(lambda options: warnings.warn('Look here.'), RunOptions, arguments=[])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == "warning: Look here.\n"
