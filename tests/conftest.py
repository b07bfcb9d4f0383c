"""What every test stands on: seeds, threads, devices, hypothesis profile."""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

# A cache of compiled graphs that outlives the run would hide a change of a fake or a formula.
_CACHE = None
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _CACHE = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="spot-test-cache-")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from support.night import nightly  # noqa: E402

THREADS = 2
_WITHOUT_GPU = pytest.StashKey[int]()  # tests that were left out

hypothesis.settings.register_profile(
    "spot",
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "nightly",
    hypothesis.settings.get_profile("spot"),
    derandomize=False,
    print_blob=True,
    max_examples=nightly(10_000),
)
hypothesis.settings.load_profile("spot")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate-cuda",
        action="store_true",
        help="run tests of both devices with the CUDA kernels on the CPU (tests/support/emulator)",
    )
    parser.addoption("--op", help="of the tests of all ops run those of this one alone")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--emulate-cuda"):
        from support import emulator

        import spot_ext  # noqa: F401  (whose kernels are replaced)

        emulator.load()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Emulated, only tests of both devices mean something, and large sizes take too long.

    Thousands of tests that need a GPU are not even set up where there is none.
    """
    if config.getoption("--op"):
        _choose(config, items, lambda item: _is_of(item, config.getoption("--op")))
    if config.getoption("--emulate-cuda"):
        _choose(config, items, _can_be_emulated)
    elif not torch.cuda.is_available() and not config.option.collectonly:
        before = len(items)
        _choose(config, items, lambda item: item.get_closest_marker("cuda") is None)
        config.stash[_WITHOUT_GPU] = before - len(items)


def _choose(
    config: pytest.Config, items: list[pytest.Item], wanted: Callable[[pytest.Item], bool]
) -> None:
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        (chosen if wanted(item) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def _can_be_emulated(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    large = any(isinstance(x, int) and x > 300 for x in params.values())
    return params.get("device") == "cpu" and not large


def _is_of(item: pytest.Item, op: str) -> bool:
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(getattr(x, "name", None) == op for x in params)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device the ops have kernels for; tests of a missing one are left out before."""
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.cuda)])
def gpu() -> torch.device:
    """For what only a GPU has: streams, graphs, unread values."""
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def fresh_compiler():
    """No graph compiled by an earlier test is reused."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pytest_collection_finish() -> None:
    """Tens of thousands of tests stay: the collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of xdist; every worker collects everything
        session.config.workeroutput["without GPU"] = session.config.stash.get(_WITHOUT_GPU, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[_WITHOUT_GPU] = getattr(node, "workeroutput", {}).get("without GPU", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    count = terminalreporter.config.stash.get(_WITHOUT_GPU, 0)
    if count:
        terminalreporter.write_line(
            f"{count} CUDA tests did not run: no GPU here. The CUDA kernels are untested."
        )


def pytest_unconfigure() -> None:
    if _CACHE is not None:
        shutil.rmtree(_CACHE, ignore_errors=True)
