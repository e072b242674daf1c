"""The console command: `hf-forward-inf trace --model ... --candidates ... --queries ... --output DIR` and others.

Only the options of the command that is asked for are imported before they are parsed, and the command itself after:
help and wrong options need neither torch nor a model.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command, by the names of what it imports.

    Args:
        options (`str`): Its dataclasses: names in [`commands.options`].
        run (`str`): `module.function` in [`commands`], which takes them.
        extra (`str`, *optional*): The extra of the package that it needs.
        bars (`bool`): Whether it shows datasets' progress bars.
        summary (`str`): Its line in the list of commands.
    """

    options: tuple[str, ...]
    run: str
    extra: str | None
    bars: bool
    summary: str


COMMANDS = {
    "trace": Command(
        ("TraceOptions", "AscentConfig"), "trace.trace_run", None, True,
        "which training examples made a language model give its answers",
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
}  # fmt: skip
USAGE = "usage: hf-forward-inf <command> [options]\n\ncommands (--help after one lists its options):\n" + "".join(
    f"  {name:10}{command.summary}\n" for name, command in COMMANDS.items()
)
EXPECTED = (ValueError, TypeError, OSError, NotImplementedError, FloatingPointError, MemoryError)
"""Errors that tell users what to change: their message is printed without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 for a run that failed, 2 for wrong options."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        asked = given[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr, end="")
        return 0 if asked else 2
    command = COMMANDS[given[0]]
    options = import_module("hf_forward_inf.commands.options")
    kinds = [getattr(options, name) for name in command.options]
    return run_command(
        partial(_run, command), *kinds, arguments=given[1:], program=f"hf-forward-inf {given[0]}",
        extra=command.extra, bars=command.bars,
    )  # fmt: skip


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
) -> int:
    """Parse options, call `run` with them, and return the exit status; an error is reported in one line.

    Args:
        run (`Callable`): Takes an instance of each of `kinds`.
        *kinds (`type`): Dataclasses of options ([`OptionParser`]).
        arguments (`Sequence[str]`, *optional*): Defaults to the words after the program's name.
        program (`str`, *optional*): Its name, for the help.
        extra (`str`, *optional*): The extra of the package to suggest where an import fails.
        bars (`bool`, defaults to `True`): Whether datasets shows progress bars; not where many short passes would.
    """
    from hf_forward_inf.utils.options import OptionParser, description

    options = OptionParser(*kinds, prog=program, description=description(kinds[0])).parse(arguments)
    try:
        _prepare(bars)
        run(*options)
    except EXPECTED as error:
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    except ImportError as error:
        hint = f" It may need: pip install 'hf-forward-inf[{extra}]'." if extra else ""
        print(f"error: {error}.{hint}".replace("..", "."), file=sys.stderr)
        return 1
    return 0


def _prepare(bars: bool) -> None:
    """Start the other processes of `accelerate launch --cpu`, and hide progress bars that nobody needs."""
    from datasets.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from hf_forward_inf.utils.processes import start_the_other_processes

    start_the_other_processes()
    disable_progress_bar()  # of loading weights
    if not bars:
        disable_progress_bars()
