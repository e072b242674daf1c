"""The console command: `hf-forward-inf trace --model ... --candidates ... --queries ... --output DIR`, `compare`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from datasets.utils import disable_progress_bars
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from hf_forward_inf.ascent import AscentConfig
from hf_forward_inf.counterfactual import CounterfactualOptions, counterfactual_run
from hf_forward_inf.finetune import FinetuneOptions, finetune_run
from hf_forward_inf.processes import start_the_other_processes
from hf_forward_inf.run import trace_run
from hf_forward_inf.task import TraceOptions
from hf_forward_inf.truth import TruthOptions, lds_run

USAGE = """usage: hf-forward-inf <command> [options]

commands:
  trace           which training examples made a language model give its answers (--help for its options)
  compare         the same, with every attributor beside (trace --compare)
  finetune        fine-tune a causal model, trace its answers, fine-tune it again without what was found
  draw            teach a diffusion model some pictures, let it draw them, trace what it has drawn
  lds             train a small model again on random halves of its data: which attributor foretold what came out?
  counterfactual  take the found examples away, train again: does the answer go away?
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; give its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["trace"]:
        return trace(given[1:], "hf-forward-inf trace")
    if given[:1] == ["finetune"]:
        return finetune(given[1:], "hf-forward-inf finetune")
    if given[:1] == ["draw"]:
        return draw(given[1:], "hf-forward-inf draw")
    if given[:1] == ["compare"]:
        return trace([*given[1:], "--compare"], "hf-forward-inf compare")
    if given[:1] == ["lds"]:
        return judge(lds_run, TruthOptions, given[1:], "hf-forward-inf lds")
    if given[:1] == ["counterfactual"]:
        return judge(counterfactual_run, CounterfactualOptions, given[1:], "hf-forward-inf counterfactual")
    print(USAGE, file=sys.stdout if given[:1] in (["-h"], ["--help"]) else sys.stderr, end="")
    return 0 if given[:1] in (["-h"], ["--help"]) else 2


def trace(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the options of `trace` and run it; a wrong input is told in one line, with exit status 1."""
    return _run(trace_run, TraceOptions, arguments, program)


def finetune(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the options of `finetune` and run it; a wrong input is told in one line, with exit status 1."""
    return _run(finetune_run, FinetuneOptions, arguments, program)


def draw(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the options of `draw` and run it; a wrong input is told in one line, with exit status 1."""
    try:
        from hf_forward_inf.draw import DrawOptions, draw_run
    except ImportError as error:
        print(f"error: {error}. Pictures need the extra: pip install 'hf-forward-inf[diffusion]'.", file=sys.stderr)
        return 1
    return _run(draw_run, DrawOptions, arguments, program)


def _run(
    run: Callable[[Any, AscentConfig], object], kind: Any, given: Sequence[str] | None, program: str | None
) -> int:
    start_the_other_processes()
    parser = HfArgumentParser(cast(Any, (kind, AscentConfig)), prog=program, description=kind.__doc__)
    try:
        options, ascent = parser.parse_args_into_dataclasses(args=given)
    except ValueError as error:
        parser.error(str(error))
    words = sys.argv[1:] if given is None else given
    if any(word.partition("=")[0].replace("-", "_") in ("__radius", "__learning_rate") for word in words):
        options.tune = False
    disable_progress_bar()  # transformers' bars for loading weights
    try:
        run(options, ascent)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def judge(
    run: Callable[[Any], object], kind: type, arguments: Sequence[str] | None = None, program: str | None = None
) -> int:
    """Parse the options of a run that retrains, and run it; a wrong input is told in one line, with exit status 1."""
    parser = HfArgumentParser(cast(Any, kind), prog=program, description=run.__doc__)
    try:
        (options,) = parser.parse_args_into_dataclasses(args=arguments)
    except ValueError as error:
        parser.error(str(error))
    disable_progress_bars()  # datasets' bars: a pass over a few hundred candidates is over in no time
    try:
        run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
