"""Worker processes of a DataLoader: which signals they heed, and how they end."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

# What terminals and schedulers send to a run's whole group.
_IGNORED = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_FOR_ALL = {*_IGNORED, signal.SIGTERM}
_RUNNING: WeakSet[Any] = WeakSet()


def default_number() -> int:
    """Workers where nobody says how many: four, or the CPUs that this process may use."""
    return min(4, len(os.sched_getaffinity(0)))


def begin(_worker: int) -> None:
    """Leaves signals to the main process, which saves first and then ends its workers.

    Python itself ends a worker that is left over with SIGTERM, more than once: the second counts.
    Torch ends one whose main process is no longer the one it had here; if that died before, it
    ends here.
    """
    main = multiprocessing.parent_process()
    if main and multiprocessing.get_start_method() == "fork" and os.getppid() != main.pid:
        os._exit(1)
    for ignored in _IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_ALL)


def started(loader: Any) -> Iterator[Any]:
    """An iterator of a DataLoader whose workers run `begin`.

    Signals wait until the workers are there: before `begin`, one would end them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_ALL)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _RUNNING.add(iterator)
    return iterator


def end(iterator: Any) -> None:
    """Ends the workers of an iterator, whoever still refers to it."""
    if hasattr(iterator, "_shutdown_workers"):  # none without workers
        iterator._shutdown_workers()


@atexit.register  # after multiprocessing's own, so it comes first: that one waits for workers
def _end_all() -> None:
    for iterator in list(_RUNNING):
        end(iterator)
