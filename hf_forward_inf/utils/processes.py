"""The processes of a run, and starting them where accelerate does not."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import parse_flag_from_env
from datasets import are_progress_bars_disabled
from datasets.utils import disable_progress_bars, enable_progress_bars

from hf_forward_inf.utils.watch import watch

RANKS = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables that torchrun and MPI set in each of several processes."""
_silent = False


def process_state() -> PartialState:
    """Return accelerate's state of this run's processes and device, also for several processes on CPUs."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if state.num_processes > 1:
        watch(state.process_index, state.num_processes)
    return state


def say(text: str) -> None:
    """Print on the main process only, unless it is silent."""
    if not _silent and process_state().is_main_process:
        print(text, flush=True)


@contextmanager
def silence(quiet: bool) -> Iterator[None]:
    """Have [`say`] print nothing, if `quiet`."""
    global _silent
    before, _silent = _silent, quiet or _silent
    try:
        yield
    finally:
        _silent = before


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Hide the progress bars of `datasets` unless `shown`; bars that the user has disabled stay disabled."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def start_the_other_processes() -> None:
    """Replace the single process that `accelerate launch --cpu --num_processes N` starts by N, under torchrun.

    accelerate (1.15) starts several processes on CPUs only through MPI: without `--mpirun_hostfile` it starts one,
    without a warning. In any other run this does nothing.
    """
    count = processes_asked_for()
    if count > 1:
        command = ["-m", "hf_forward_inf.utils.launch", "--standalone", "--nproc_per_node", str(count), *sys.argv]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *command])


def processes_asked_for() -> int:
    """Return the `--num_processes` of `accelerate launch --cpu` if only this process was started, else 1."""
    parent = psutil.Process().parent()
    if parent is None or not parse_flag_from_env("ACCELERATE_USE_CPU") or any(name in os.environ for name in RANKS):
        return 1
    words = parent.cmdline()
    command = next((i for i, word in enumerate(words) if word.endswith("launch")), None)
    if command is None:
        return 1
    asked, _ = launch_command_parser().parse_known_args(words[command + 1 :])
    return asked.num_processes or 1
