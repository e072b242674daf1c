"""The processes of a run: which one this is, and starting them where accelerate does not."""

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

RANKS = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables by which torchrun and MPI tell a process that it is one of several."""


def process_state() -> PartialState:
    """Tell what accelerate knows of this run's processes and device, joining those started on CPUs too."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def say(text: str) -> None:
    """Print, on the main process only."""
    if process_state().is_main_process:
        print(text, flush=True)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Hide datasets' progress bars unless `shown`; where the user has turned them off, they stay off."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def start_the_other_processes() -> None:
    """Replace a process that `accelerate launch --cpu --num_processes N` started alone by N, under torchrun.

    accelerate (1.15) leaves starting several processes on CPUs to MPI: without `--mpirun_hostfile` it starts one and
    says nothing. Does nothing anywhere else.
    """
    count = processes_asked_for()
    if count > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *sys.argv]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *command])


def processes_asked_for() -> int:
    """Count the processes that the user asked `accelerate launch --cpu` for, if this one stands alone; else 1."""
    parent = psutil.Process().parent()
    if parent is None or not parse_flag_from_env("ACCELERATE_USE_CPU") or any(name in os.environ for name in RANKS):
        return 1
    words = parent.cmdline()
    command = next((i for i, word in enumerate(words) if word.endswith("launch")), None)
    if command is None:
        return 1
    asked, _ = launch_command_parser().parse_known_args(words[command + 1 :])
    return asked.num_processes or 1
