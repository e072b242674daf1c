"""The console command: `hf-forward-inf trace --model ... --candidates ... --queries ... --output DIR` and others.

Only the options of the command that is asked for are imported before they are parsed, and the command itself after:
help and wrong options need neither torch nor a model.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.metadata import version
from io import StringIO
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command, by the names of what it imports.

    Args:
        options (`str`): Its dataclasses: names in [`commands.options`].
        run (`str`): `module.function` in [`commands`], which takes them.
        extra (`str`, *optional*): The extra of the package that it needs.
        bars (`bool`): Whether it shows progress.
        summary (`str`): Its line in the list of commands.
        alone (`bool`, defaults to `False`): Whether it runs no model, and so needs no processes
            and no progress bars.
    """

    options: tuple[str, ...]
    run: str
    extra: str | None
    bars: bool
    summary: str
    alone: bool = False


COMMANDS = {
    "trace": Command(
        ("TraceOptions", "AscentConfig"), "trace.trace_run", None, True,
        "which training examples made a model give its answers",
    ),
    "compare": Command(
        ("CompareOptions", "AscentConfig"), "trace.trace_run", None, True,
        "the same by every attributor, side by side (trace --compare)",
    ),
    "finetune": Command(
        ("FinetuneOptions", "AscentConfig"), "finetune.finetune_run", None, True,
        "fine-tune a causal model, trace its answers, fine-tune it again without what was found",
    ),
    "laion": Command(
        ("LaionOptions", "AscentConfig"), "laion.laion_run", "diffusion", True,
        "trace what a diffusion model drew over captioned pictures that don't fit on the disk",
    ),
    "leakage": Command(
        ("LeakageOptions",), "leakage.leakage_run", "truth", False,
        "put training images into the test set: is the training copy of each found?",
    ),
    "mislabel": Command(
        ("MislabelOptions",), "mislabel.mislabel_run", "truth", False,
        "which labels look wrong? Your images, the most suspicious first",
    ),
    "explore": Command(
        ("ExploreOptions",), "explore.explore_run", "explore", True,
        "explore a run's results in the browser, or write them as a Space",
    ),
    "cache": Command(
        ("CacheOptions",), "cache.cache_run", None, False,
        "show, prune or clear the cache of losses and curvature", True,
    ),
}  # fmt: skip
PROGRAM = "hf-forward-inf"
USAGE = (
    f"usage: {PROGRAM} COMMAND [options]\n\nWhich training examples made my model say this?\n\ncommands:\n"
    + "".join(f"  {name:12}{command.summary}\n" for name, command in COMMANDS.items())
    + "  completion  print a script that completes commands and options in your shell (bash, zsh, fish, ...)\n"
    + f"\n{PROGRAM} COMMAND --help lists a command's options, --version prints the version.\n"
)
EXPECTED = (ValueError, TypeError, OSError, NotImplementedError, FloatingPointError, MemoryError)
"""Errors that tell users what to change: their message is printed without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for a run that failed, 2 for wrong options."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        print(f"{PROGRAM} {version(PROGRAM)}")
        return 0
    if given[:1] == ["completion"]:
        return _completion(given[1:])
    if not given or given[0] not in COMMANDS:
        return _usage(given)
    command = COMMANDS[given[0]]
    return run_command(
        partial(_run, command), *kinds_of(command), arguments=given[1:], program=f"{PROGRAM} {given[0]}",
        extra=command.extra, bars=command.bars, alone=command.alone,
    )  # fmt: skip


def _usage(given: Sequence[str]) -> int:
    """Print the commands; on stderr, and with the closest one, if none was named."""
    if given[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    from hf_forward_inf.utils.parser import did_you_mean

    if given:
        hint = did_you_mean(given[0], [*COMMANDS, "completion"])
        print(f"error: there is no command {given[0]}.{hint}\n", file=sys.stderr)
    print(USAGE, file=sys.stderr, end="")
    return 2


def _completion(given: Sequence[str]) -> int:
    """Print a script for a shell, made by shtab from the options of all commands."""
    from argparse import ArgumentParser

    import shtab

    from hf_forward_inf.utils.parser import OptionParser

    if len(given) != 1 or given[0] not in shtab.SUPPORTED_SHELLS:
        print(f"usage: {PROGRAM} completion {{{','.join(shtab.SUPPORTED_SHELLS)}}}", file=sys.stderr)
        return 2
    everything = ArgumentParser(prog=PROGRAM)
    everything.add_argument("--version", action="store_true")
    made: Any = lambda kinds, prog: OptionParser(*kinds, prog=prog)  # noqa: E731
    commands = everything.add_subparsers(parser_class=made)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, kinds=kinds_of(command))
    print(shtab.complete(everything, shell=given[0]))
    return 0


def kinds_of(command: Command) -> list[type]:
    """Return the dataclasses of a command's options."""
    options = import_module("hf_forward_inf.commands.options")
    return [getattr(options, name) for name in command.options]


def _run(command: Command, *options: Any) -> object:
    module, _, name = command.run.partition(".")
    return getattr(import_module(f"hf_forward_inf.commands.{module}"), name)(*options)


def run_command(
    run: Callable[..., object],
    *kinds: type,
    arguments: Sequence[str] | None = None,
    program: str | None = None,
    extra: str | None = None,
    bars: bool = True,
    alone: bool = False,
) -> int:
    """Parse options, call `run` with them, and return the exit status; an error is reported in one line.

    Args:
        run (`Callable`): Takes an instance of each of `kinds`; what it returns is the result that `--json` prints.
        *kinds (`type`): Dataclasses of options ([`OptionParser`]).
        arguments (`Sequence[str]`, *optional*): Defaults to the words after the program's name.
        program (`str`, *optional*): Its name, for the help.
        extra (`str`, *optional*): The extra of the package to suggest where an import fails.
        bars (`bool`, defaults to `True`): Whether progress is shown; not where many short passes would.
        alone (`bool`, defaults to `False`): Whether no model is run, so that nothing is prepared for one.
    """
    from hf_forward_inf.utils.interruptions import interruptible, is_lost_peer, report, report_lost_peer, say_once
    from hf_forward_inf.utils.parser import OptionParser

    words = sys.argv[1:] if arguments is None else arguments
    with redirect_stderr(StringIO()) if int(os.environ.get("RANK", 0)) else nullcontext():  # wrong options, once
        options, given = OptionParser(*kinds, prog=program).parse(words)
    try:
        printed = redirect_stdout(StringIO()) if given.json else nullcontext()
        with interruptible(), printed, nullcontext() if alone else _prepared(bars, given.quiet or given.json):
            result = run(*options)
        if given.json:
            _print_json(result)
    except KeyboardInterrupt as stop:
        return report(stop)
    except EXPECTED as error:
        say_once(f"error: {str(error) or type(error).__name__}")
        return 1
    except ImportError as error:
        hint = f" It may need: pip install 'hf-forward-inf[{extra}]'." if extra else ""
        say_once(f"error: {error}.{hint}".replace("..", "."))
        return 1
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        return report_lost_peer()
    return 0


@contextmanager
def _prepared(bars: bool, quiet: bool) -> Iterator[None]:
    """Start the other processes of `accelerate launch --cpu`, and hide what nobody needs to read.

    Args:
        bars (`bool`): Whether progress is shown.
        quiet (`bool`): Whether messages are hidden, and progress too.
    """
    from transformers.utils.logging import disable_progress_bar

    from hf_forward_inf.utils.processes import progress_bars, silence, start_the_other_processes

    start_the_other_processes()
    disable_progress_bar()  # of loading weights
    own, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        with warnings.catch_warnings(), progress_bars(bars and not quiet), silence(quiet):
            for kind in (FutureWarning, DeprecationWarning):  # of packages, which users can't change
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        warnings.formatwarning = own


def _one_line(message: Any, *_: Any, **__: Any) -> str:
    """Return a warning without the line of code that gave it, to be printed in the place of a progress bar."""
    from hf_forward_inf.utils.progress import clear

    clear()
    return f"warning: {message}\n"


def _print_json(result: object) -> None:
    if int(os.environ.get("RANK", 0)) == 0:  # not accelerate's state: a command may run no model
        print(json.dumps(result, indent=2, default=str))
