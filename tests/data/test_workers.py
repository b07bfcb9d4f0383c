"""Worker processes end with the process that they load for."""

from __future__ import annotations

from support.commands import python

KILLED = """
import os, signal, time
from torch.utils.data import DataLoader
from spot_vit.data.workers import begin, started

main = os.getpid()

def late(worker):
    while os.getppid() == main:
        time.sleep(0.01)
    begin(worker)

os.register_at_fork(after_in_parent=lambda: os.kill(main, signal.SIGKILL))
started(DataLoader(range(9), num_workers=1, worker_init_fn=late))
"""


def test_a_worker_whose_process_is_killed_as_it_starts_ends() -> None:
    """It holds that process's standard output, so this waits for it."""
    done = python("-c", KILLED, timeout=40)
    assert done.returncode == -9, done.stderr
