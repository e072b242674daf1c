"""Runs in processes of their own, to be interrupted and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.helpers.causal import train_tokens, untrained

ROOT = Path(__file__).parents[2]
TEXTS = [{"text": f"The capital of land {i} is town {i * 7 % 100}."} for i in range(400)]
SLOW = """
import os, sys, time
from pathlib import Path
from hf_forward_inf.cli import main
from hf_forward_inf.passes import candidate_pass
from hf_forward_inf.passes.candidate_pass import CandidatePass

values, batches = CandidatePass.values, candidate_pass.batches

def slowly(*arguments):
    Path(os.environ["HF_FORWARD_INF_CACHE"], "begun").touch()
    time.sleep(float(sys.argv[1]))
    return values(*arguments)

CandidatePass.values = slowly
candidate_pass.batches = lambda lengths, limit: batches(lengths, min(limit, 200))
sys.exit(main(sys.argv[2:]))
"""
"""The command with small batches and a pause before each, of as many seconds as the first argument says."""
LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")


def small_model(folder):
    """Save a small causal model, queries and candidates, and return the options of `trace`; and a slow command."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokens()
    untrained("llama", len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in {"queries": TEXTS[:4], "candidates": TEXTS}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "slow.py").write_text(SLOW)
    return [
        "--model", folder / "model", "--queries", folder / "queries.jsonl",
        "--candidates", folder / "candidates.jsonl", "--no_baselines", "--direction", "gradient",
        "--radius", "1", "--top_k", "5",
    ]  # fmt: skip


def environment(cache, **more):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_FORWARD_INF_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **more,
    }  # fmt: skip


def start(*words, cache, **options):
    """Start Python with some words, in a session of its own."""
    more = options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment(cache, **more), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def wait_for(condition, seconds=60.0):
    """Wait until a condition holds, and return whether it did in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return False


def stored_files(cache):
    return list(Path(cache).glob("passes/*/*/*.safetensors"))


def alive(cache):
    """The processes of the run with this cache that have not ended: those of torchrun have sessions of their own."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            own = f"HF_FORWARD_INF_CACHE={cache}".encode() in (process / "environ").read_bytes().split(b"\0")
            if own and (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(process.name))
        except OSError:
            continue
    return found


def command_of(process):
    return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")


def kill_all(cache):
    """Kill all processes of the run with this cache."""
    for one in alive(cache):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
