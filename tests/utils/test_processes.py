import psutil
import pytest

from hf_forward_inf.utils import processes


class Parent:
    def __init__(self, command):
        self.command = command

    def parent(self):
        return self

    def cmdline(self):
        return self.command.split()


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("python -m accelerate.commands.launch --cpu --num_processes 2 recipe.py --epochs 3", 2),
        ("python bin/accelerate launch --cpu --num-processes=3 recipe.py --num_processes 5", 3),
        ("python bin/accelerate-launch --cpu recipe.py", 1),
        ("bash", 1),
    ],
)
def test_the_count_is_read_from_the_command_that_launched_us(command, count, monkeypatch):
    for name in processes.RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(psutil, "Process", lambda: Parent(command))
    assert processes.processes_asked_for() == 1  # not launched for CPUs
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert processes.processes_asked_for() == count
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert processes.processes_asked_for() == 1  # already one of several
