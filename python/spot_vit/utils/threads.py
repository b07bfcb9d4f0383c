"""How threads of torch wait for each other; to be settled before torch is imported."""

from __future__ import annotations

import os
import sys

WAIT_POLICY = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""Environment variables with which commands start, measured by benchmarks/wait_policy.py.

Between parallel regions, threads of OpenMP spin for some time before they sleep. Where another
process has one of their cores, each region waits for a thread that is not running, and the others
spin through the time that it would need. Sleeping at once costs a wake-up at every region instead.
GNU's library counts the turns of its loop, LLVM's and Intel's milliseconds.
"""

_OF_USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def set_wait_policy() -> bool:
    """Sets `WAIT_POLICY`, unless the user set a policy or torch is there already.

    Returns:
        Whether it was set. Libraries read it when they are loaded, so later would be too late.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _OF_USERS):
        return False
    os.environ.update(WAIT_POLICY)
    return True
