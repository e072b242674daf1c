"""The console command: `hf-forward-inf trace --model ... --candidates ... --queries ... --output DIR`, `compare`."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, cast

from datasets.utils import disable_progress_bars
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.commands.finetune import FinetuneOptions, finetune_run
from hf_forward_inf.commands.leakage import LeakageOptions, leakage_run
from hf_forward_inf.commands.mislabel import MislabelOptions, mislabel_run
from hf_forward_inf.commands.trace import trace_run
from hf_forward_inf.commands.trace_source import TraceOptions
from hf_forward_inf.utils.processes import start_the_other_processes

USAGE = """usage: hf-forward-inf <command> [options]

commands:
  trace           which training examples made a language model give its answers (--help for its options)
  compare         the same, with every attributor beside (trace --compare)
  finetune        fine-tune a causal model, trace its answers, fine-tune it again without what was found
  laion           trace what a diffusion model drew over captioned pictures that are too many for the disk
  leakage         put training images into the test set: does each find its training copy?
  mislabel        which labels are wrong? Training examples that nothing but themselves supports
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; give its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str], str], int]] = {
        "trace": trace,
        "compare": lambda words, program: trace([*words, "--compare"], program),
        "finetune": finetune,
        "laion": laion,
        "leakage": partial(run_command, leakage_run, LeakageOptions),
        "mislabel": partial(run_command, mislabel_run, MislabelOptions),
    }
    if given and given[0] in commands:
        return commands[given[0]](given[1:], f"hf-forward-inf {given[0]}")
    print(USAGE, file=sys.stdout if given[:1] in (["-h"], ["--help"]) else sys.stderr, end="")
    return 0 if given[:1] in (["-h"], ["--help"]) else 2


def trace(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the options of `trace` and run it; a wrong input is told in one line, with exit status 1."""
    return with_ascent(trace_run, TraceOptions, arguments, program)


def finetune(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the options of `finetune` and run it; a wrong input is told in one line, with exit status 1."""
    return with_ascent(finetune_run, FinetuneOptions, arguments, program)


def laion(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the options of `laion` and run it; a wrong input is told in one line, with exit status 1."""
    return _with_pictures("laion", "laion_run", "LaionOptions", arguments, program)


def _with_pictures(
    module: str, run: str, kind: str, arguments: Sequence[str] | None = None, program: str | None = None
) -> int:
    try:
        experiment = import_module(f"hf_forward_inf.commands.{module}")
    except ImportError as error:
        print(f"error: {error}. Pictures need the extra: pip install 'hf-forward-inf[diffusion]'.", file=sys.stderr)
        return 1
    return with_ascent(getattr(experiment, run), getattr(experiment, kind), arguments, program)


def run_command(
    run: Callable[[Any], object], kind: type, arguments: Sequence[str] | None = None, program: str | None = None
) -> int:
    """Parse the options of a run that retrains, and run it; a wrong input is told in one line, with exit status 1."""
    disable_progress_bars()  # datasets' bars: a pass over a few hundred candidates is over in no time
    return _run(run, (kind,), run.__doc__, arguments, program)


def with_ascent(
    run: Callable[[Any, AscentConfig], object],
    kind: type,
    arguments: Sequence[str] | None = None,
    program: str | None = None,
) -> int:
    """Parse the options of a run and of its ascent, and run it."""
    start_the_other_processes()
    disable_progress_bar()  # transformers' bars for loading weights
    return _run(run, (kind, AscentConfig), kind.__doc__, arguments, program)


def _run(
    run: Callable[..., object],
    kinds: tuple[type, ...],
    description: str | None,
    arguments: Sequence[str] | None,
    program: str | None,
) -> int:
    parser = HfArgumentParser(cast(Any, kinds), prog=program, description=description)
    try:
        options = parser.parse_args_into_dataclasses(args=arguments)
    except ValueError as error:
        parser.error(str(error))
    try:
        run(*options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
