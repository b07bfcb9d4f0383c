"""The policy of waiting threads: set before torch is there, unless the user set one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from spot_vit.utils.threads import WAIT_POLICY, set_wait_policy

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

CODE = """
import json, os
from spot_vit.utils.threads import set_wait_policy
done = set_wait_policy()
import torch
torch.rand(300, 300) @ torch.rand(300, 300)
names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
print(json.dumps([done, set_wait_policy(), {n: os.environ[n] for n in names if n in os.environ}]))
"""


def in_a_process(**given: str) -> tuple[list, str]:
    """What the code above says, and what the library of the threads says it has read."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}",
        "OMP_DISPLAY_ENV": "VERBOSE",
        **given,
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_the_library_reads_the_policy_and_it_is_set_once() -> None:
    (first, second, environment), said = in_a_process()
    assert first and not second and environment == WAIT_POLICY
    assert f"GOMP_SPINCOUNT = '{WAIT_POLICY['GOMP_SPINCOUNT']}'" in said or "GOMP" not in said


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_of_the_user_stays(name: str) -> None:
    value = "ACTIVE" if name == "OMP_WAIT_POLICY" else "12345"
    (first, second, environment), _ = in_a_process(**{name: value})
    assert not first and not second and environment == {name: value}


def test_it_is_too_late_where_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    assert not set_wait_policy() and dict(os.environ) == before
