"""Runs that are interrupted, terminated or killed: one line says how to go on, nothing is lost, nothing stays."""

import os
import signal
import socket

import numpy as np
import pytest

from hf_forward_inf import Attribution
from hf_forward_inf.utils.interruptions import is_lost_peer
from tests.helpers.runs import LAUNCH, alive, command_of, kill_all, small_model, start, stored_files, wait_for

GOES_ON = "what was computed is cached in {}. The same command goes on from there."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def options(folder):
    return small_model(folder)


@pytest.fixture(scope="module")
def expected(folder, options):
    """The scores of a run that nobody interrupts."""
    return finished(folder, options, folder / "undisturbed").scores


def finished(folder, options, cache):
    """Run the command to its end, and return what it has written."""
    process = start(folder / "slow.py", 0, "trace", *options, "--output", cache / "out", cache=cache)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert not list(cache.rglob(".writing-*")) and not list(cache.rglob(".complete"))
    return Attribution.load_from_disk(cache / "out" / "attribution")


def begin(folder, options, cache, *launch, pause=0.4):
    """Start the command, slowed down, and wait for the first batch."""
    (cache / "begun").unlink(missing_ok=True)
    process = start(*launch, folder / "slow.py", pause, "trace", *options, "--output", cache / "out", cache=cache)
    assert wait_for(lambda: (cache / "begun").exists() or process.poll() is not None)
    assert process.poll() is None
    return process


def lines(text):
    return [line for line in text.splitlines() if line and not line.startswith("warning: ")]


def test_a_run_that_is_stopped_again_and_again_loses_no_row_and_no_bit(folder, options, expected):
    cache, before = folder / "stopped", {}
    for number, status, word in ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")):
        process = begin(folder, options, cache)
        wait_for(lambda: False, 1.0)  # some batches more
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == status
        assert lines(said) == [f"{word}: {GOES_ON.format(cache)}"]
        assert {path: path.stat().st_ino for path in before} == before  # not computed again
        assert len(stored_files(cache)) > len(before)
        before = {path: path.stat().st_ino for path in stored_files(cache)}

    process = begin(folder, options, cache, *LAUNCH, pause=1)  # it must not end before its workers notice
    assert len(alive(cache)) == 4  # accelerate, torchrun and two more
    process.kill()  # the launcher alone
    process.communicate()
    assert wait_for(lambda: not alive(cache)), [command_of(one) for one in alive(cache)]

    # As many threads as before: not a bit differs between one process and two.
    np.testing.assert_array_equal(finished(folder, options, cache).scores, expected)
    assert {path: path.stat().st_ino for path in before} == before


def test_a_users_error_in_several_processes_is_said_once(folder, options, tmp_path):
    wrong = [*options, "--candidates", "/nowhere/rows.jsonl", "--output", tmp_path / "out"]
    quiet = ("--quiet", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    process = start(*LAUNCH, *quiet, folder / "slow.py", 0, "trace", *wrong, cache=tmp_path)
    _, said = process.communicate()
    assert process.returncode == 1
    (line,) = said.splitlines()  # nor is there anything else, such as a traceback of a launcher
    assert line.startswith("error: There is no file or folder /nowhere/rows.jsonl")


def test_a_users_error_under_our_own_launcher_has_its_status(tmp_path):
    words = ("--standalone", "--nproc_per_node", "2", "-m", "hf_forward_inf", "trace", "--model", "/nowhere")
    files = ("--queries", "/nowhere/q.jsonl", "--candidates", "/nowhere/c.jsonl", "--output", tmp_path / "out")
    process = start(
        "-m", "hf_forward_inf.utils.launch", *words, *files, cache=tmp_path, env={"ACCELERATE_USE_CPU": "true"}
    )
    _, said = process.communicate()
    assert process.returncode == 1
    (line,) = said.splitlines()
    assert line.startswith("error: There is no file or folder /nowhere,")


WAITING = """
import os
from hf_forward_inf.utils.interruptions import interruptible, report
from hf_forward_inf.utils.processes import process_state

try:
    with interruptible():
        state = process_state()
        print("ready", flush=True)
        os.read(0, 1) if state.process_index else state.wait_for_everyone()
except KeyboardInterrupt as stop:
    os._exit(report(stop))
"""


def test_a_process_that_is_not_heard_of_is_named(tmp_path):
    """Without torchrun, whose agent would notice: processes that were started by hand, one of which hangs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"ACCELERATE_USE_CPU": "true", "HF_FORWARD_INF_TIMEOUT": "4"}
    ranks = [
        start("-c", WAITING, cache=tmp_path, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=-1)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "ready\n", rank.stderr.read()
        wait_for(lambda: False, 2.0)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        _, said = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 143
        assert "rank 1 has not been heard of for 4 seconds" in said
    finally:
        kill_all(tmp_path)
        ranks[1].communicate()


def test_errors_of_communication_are_told_from_others():
    assert is_lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
