"""Watches the launcher and the other processes of a run: a process that waits for a dead one would wait forever."""

import atexit
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from hf_forward_inf.utils.interruptions import SIGTERM_STATUS, end

SILENCE = float(os.environ.get("HF_FORWARD_INF_TIMEOUT", 60))
"""Seconds without a sign of life after which a process counts as dead."""
GRACE = 10.0
"""Seconds in which a process that is to end may store what it has computed."""
LEAVE = 2.0
"""Seconds in which the thread finishes what it has begun when its process ends."""
_threads: list["Watch"] = []


def watch(rank: int = 0, world: int = 1) -> None:
    """Watch what this process depends on, from now to its end; further calls do nothing."""
    if not _threads:
        _threads.append(Watch(rank, world))
        _threads[0].start()


class Watch(threading.Thread):
    """A thread that ends its process when the launcher or another process of the run has died.

    Processes show that they are alive by counting in the store through which they have met; each watches the next.

    Args:
        rank (`int`): Number of this process.
        world (`int`): Number of processes.
    """

    def __init__(self, rank: int, world: int):
        super().__init__(name="hf_forward_inf watch", daemon=True)
        self.rank, self.world = rank, world
        self.store: Any = None
        self.launcher = os.getppid()
        self.launched = world == 1 or "TORCHELASTIC_RUN_ID" in os.environ  # not by hand, from a shell that may close
        self.next, self.seen, self.heard = (rank + 1) % world, b"", time.monotonic()
        self.over = threading.Event()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the thread before Python does: torch aborts a process whose threads end within its code."""
        self.over.set()
        if threading.current_thread() is not self:
            self.join(LEAVE)
        if self.store is not None:
            with suppress(Exception):  # its host may have left before
                self.store.set(f"{self.rank}", "done")

    def run(self) -> None:
        """Look after the others every second, for as long as the process lives."""
        self.store, count = self._store(), 0
        while not self.over.wait(min(1.0, SILENCE / 5)):
            if self.launched and os.getppid() != self.launcher:
                self.end("the launcher has ended")
            count += 1
            if self.store is not None:
                try:
                    self.store.set(f"{self.rank}", str(count))
                    self.listen(self.store)
                except RuntimeError:  # its host has ended, which communication itself notices
                    self.store = None

    def _store(self) -> Any:
        """Connect to the store of this run; `None` where there is none."""
        if self.world == 1:
            return None
        import torch.distributed as dist

        with suppress(Exception):  # MPI has none
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # A connection of its own: that of the main thread is taken while it waits.
            own = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SILENCE))
            store = dist.PrefixStore("hf_forward_inf/alive", own)
            return store
        return None

    def listen(self, store: Any) -> None:
        """Look whether the next process is alive, or another one has found one dead."""
        if store.check(["dead"]):
            self.end(f"rank {store.get('dead').decode()} has not been heard of for {SILENCE:g} seconds")
        key = f"{self.next}"
        now = store.get(key) if store.check([key]) else b""
        if now != self.seen or now == b"done":
            self.seen, self.heard = now, time.monotonic()
        if time.monotonic() - self.heard > SILENCE:
            store.set("dead", key)

    def end(self, reason: str) -> None:
        """End the process: as SIGTERM does, and where that is not heard, at once."""
        end(reason, SIGTERM_STATUS)
        time.sleep(GRACE)
        with suppress(RuntimeError):  # a store whose host has died
            if self.store is not None and self.store.add(reason, 1) > 1:
                os._exit(SIGTERM_STATUS)
        print(f"error: {reason}. The same command goes on from what is cached.", file=sys.stderr, flush=True)
        os._exit(SIGTERM_STATUS)
