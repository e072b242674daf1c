"""Runs that end early: Ctrl-C, SIGTERM, a user's error in several processes; each is said once, in one line."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PATIENCE = 3.0
"""Seconds in which a process that fails for a reason of its own has said so."""
SIGTERM_STATUS = 128 + signal.SIGTERM


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread where a run is to end: what has computed something stores it on the way out.

    Args:
        reason (`str`): Why, for the message.
        status (`int`): The exit status.
    """

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.reason, self.status = reason, status


_reason = ["terminated", SIGTERM_STATUS]


def end(reason: str, status: int) -> None:
    """End this process from another thread, as SIGTERM does, with a reason of its own."""
    _reason[:] = [reason, status]
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM raise [`Interrupted`] for the length of a `with`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what is computed is being stored
    raise Interrupted(*_reason)  # type: ignore[arg-type]


def report(stop: KeyboardInterrupt) -> int:
    """Say in one line that a run was interrupted and how to go on, and return the exit status."""
    from hf_forward_inf.utils.storage import default_cache_dir

    reason, status = (stop.reason, stop.status) if isinstance(stop, Interrupted) else ("interrupted", 130)
    say_once(f"{reason}: what was computed is cached in {default_cache_dir()}. The same command goes on from there.")
    return status


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is that of communication with a process that has ended."""
    lost = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting")
    return type(error).__name__.startswith("Dist") or any(words in str(error) for words in lost)


def report_lost_peer() -> int:
    """Say that another process has ended, unless one has said why, and return the exit status."""
    time.sleep(PATIENCE)
    store = _store()
    with suppress(Exception):
        if store is not None and store.check(["said"]):
            return 1
    say_once("error: another process of this run has ended. The same command goes on from what is cached.")
    return 1


def say_once(text: str) -> None:
    """Print on stderr, in the first of the processes that have the same to say."""
    store = _store()
    with suppress(Exception):  # a store whose host has died
        if store is not None:
            store.set("said", "1")
            if store.add(text, 1) > 1:
                return
    print(text, file=sys.stderr, flush=True)


def _store():  # type: ignore[no-untyped-def]
    """Return what the processes of this run share, `None` for a single one."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.PrefixStore("hf_forward_inf/said", dist.distributed_c10d._get_default_store())
