"""The measured crossover: its arithmetic by hand, its file, and one small real measurement."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from spot_vit.cli.bench import describe
from spot_vit.cli.main import main
from spot_vit.nn import attention_backend as backend

CPU = torch.device("cpu")


def entry(rate: float, sparse: float, masked: float = 2.0, plain: float = 1.0) -> backend.Entry:
    return {"keep_rate": rate, "sparse": sparse, "masked": masked, "plain": plain}


class Fake:
    """A timer for which sparse attention costs rate * slope, and dense attention 1."""

    def __init__(self, slope: float) -> None:
        self.slope, self.calls = slope, 0

    def __call__(
        self, size: int, rate: float, dtype: torch.dtype, device: torch.device
    ) -> backend.Entry:
        self.calls += 1
        return entry(rate, rate * self.slope, 1.0)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SPOT_CROSSOVER", raising=False)
    monkeypatch.setattr(backend, "_answers", {})
    monkeypatch.setattr(backend, "_tables", {})
    monkeypatch.setattr(backend, "contention", lambda *_: None)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake(2.0)
    monkeypatch.setattr(backend, "time_entry", fake)
    return fake


def forget() -> None:
    """What a new process would not know."""
    backend._answers.clear()
    backend._tables.clear()


def test_the_crossover_is_linear_between_entries() -> None:
    # Ratios 0.5, 0.9, 1.3: equal at a quarter of the way from 0.4 to 0.6.
    column = [entry(0.2, 1.0), entry(0.4, 1.8), entry(0.6, 2.6)]
    assert backend.crossover_rate(column) == pytest.approx(0.45)
    assert backend.crossover_rate(column[::-1]) == pytest.approx(0.45)
    assert backend.crossover_rate(column[:2]) == 1.0
    assert backend.crossover_rate(column[2:]) == 0.0


def test_sizes_are_compared_by_their_logarithm() -> None:
    assert [backend.nearest(n) for n in (1, 50, 70, 71, 577, 760, 780, 10**6)] == [
        50, 50, 50, 100, 577, 577, 1025, 4097,
    ]  # fmt: skip


def test_the_choice_follows_the_crossover_and_is_measured_once(timer: Fake) -> None:
    for rate, expected in ((0.25, "sparse"), (0.5, "sparse"), (0.51, "dense"), (1.0, "dense")):
        assert backend.choose(577, rate, torch.float32, CPU) == expected
    backend.choose(600, 0.25, torch.float32, CPU)  # the same column
    assert timer.calls == len(backend.RATES)
    forget()
    backend.choose(577, 0.3, torch.float32, CPU)  # from the file
    assert timer.calls == len(backend.RATES)
    backend.choose(1025, 0.3, torch.float32, CPU)
    backend.choose(577, 0.3, torch.bfloat16, CPU)
    assert timer.calls == 3 * len(backend.RATES)
    table = backend.read(backend.cache_path(backend.machine(CPU)))
    found = {(column["tokens"], column["dtype"]) for column in table["columns"]}
    assert found == {(577, "float32"), (1025, "float32"), (577, "bfloat16")}


def test_another_number_of_threads_is_another_machine(timer: Fake) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            backend.choose(577, 0.3, torch.float32, CPU)
            assert timer.calls == count * len(backend.RATES)
    finally:
        torch.set_num_threads(threads)


def test_figures_of_a_busy_machine_are_not_written_down(
    timer: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "contention", lambda *_: "others")
    assert backend.choose(577, 0.3, torch.float32, CPU) == "sparse"
    assert backend.choose(577, 0.9, torch.float32, CPU) == "dense"
    assert timer.calls == len(backend.RATES)
    forget()
    backend.choose(577, 0.3, torch.float32, CPU)
    assert timer.calls == 2 * len(backend.RATES)


def test_a_given_file_is_used_and_never_added_to(
    timer: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "given.json"
    column: dict[str, Any] = {"tokens": 577, "dtype": "float32", "device": "cpu"}
    column |= {"entries": [entry(0.1, 3.0)], "contended": None}
    path.write_text(json.dumps({"machine": {}, "columns": [column]}))
    before = path.read_text()
    monkeypatch.setenv("SPOT_CROSSOVER", str(path))
    assert backend.choose(577, 0.1, torch.float32, CPU) == "dense"
    assert backend.choose(1025, 0.1, torch.float32, CPU) == "sparse"  # not in the file
    assert timer.calls == 0 and path.read_text() == before
    for text in ("{}", "nothing", '{"columns": [{"tokens": 1}]}'):
        path.write_text(text)
        forget()
        with pytest.raises(ValueError, match="no crossover table"):
            backend.choose(577, 0.1, torch.float32, CPU)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "half of a fi",
        "[]",
        '{"columns": 3}',
        '{"columns": [{"tokens": 577, "dtype": "float32", "device": "cpu", "entries": []}]}',
        '{"columns": [{"tokens": 577, "dtype": "float32", "device": "cpu", "entries": '
        '[{"keep_rate": 0.5, "sparse": NaN, "masked": 1.0}]}]}',
        "\udcff",
    ],
)
def test_a_damaged_cache_is_measured_again_and_mended(timer: Fake, text: str) -> None:
    path = backend.cache_path(backend.machine(CPU))
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning, match=rf"{path.name} is no crossover table .*measured again"):
        assert backend.choose(577, 0.3, torch.float32, CPU) == "sparse"
    assert timer.calls == len(backend.RATES)
    forget()
    assert backend.choose(577, 0.9, torch.float32, CPU) == "dense"
    assert timer.calls == len(backend.RATES)  # from the new file


def test_a_cache_that_cannot_be_read_or_written_costs_only_time(
    timer: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert backend.choose(577, 0.3, torch.float32, CPU) == "sparse"
    forget()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(backend.os.path, "expanduser", lambda path: path)  # nobody's home
    monkeypatch.setattr(backend.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    assert backend.choose(577, 0.3, torch.float32, CPU) == "sparse"
    assert timer.calls == 2 * len(backend.RATES)
    assert list((tmp_path / "temporary/.cache/spot").glob("crossover-*.json"))


def test_nothing_is_measured_where_something_watches(timer: Fake) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert backend.choose(577, 0.9, torch.float32, CPU) == "sparse"
    assert backend.choose(577, 0.9, torch.float32, torch.device("meta")) == "sparse"

    @torch.compiler.assume_constant_result
    def ask() -> str:
        return backend.choose(577, 0.9, torch.float32, CPU)

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if ask() == "sparse" else x - 1

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())).item() == 1
    assert timer.calls == 0
    assert backend.choose(577, 0.9, torch.float32, CPU) == "dense"
    torch.compiler.reset()
    assert compiled(torch.zeros(())).item() == -1  # the cached table may be asked
    assert timer.calls == len(backend.RATES)


def test_processes_add_to_one_file(timer: Fake) -> None:
    facts = backend.machine(CPU)
    path = backend.cache_path(facts)
    for size in (50, 100, 50):
        backend._keep(path, backend.measure_column(size, torch.float32, CPU), facts)
    assert [column["tokens"] for column in backend.read(path)["columns"]] == [100, 50]
    assert [*path.parent.glob(".*")] == []  # nothing half written


def test_a_cache_that_cannot_be_written_is_done_without(
    timer: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert backend.choose(577, 0.9, torch.float32, CPU) == "dense"


def test_a_real_measurement_leaves_randomness_and_modes_alone() -> None:
    state = torch.get_rng_state()
    with torch.inference_mode():
        found = backend.time_entry(50, 0.25, torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert found["keep_rate"] == 0.25
    assert all(0 < found[side] < 1000 for side in ("sparse", "masked", "plain"))
    index = backend._some_keys(50, 13, torch.Generator().manual_seed(0))
    assert index.shape == (1, backend.HEADS, 49, 13) and index.dtype == torch.int32
    assert (index.diff(dim=-1) > 0).all() and index.min() >= 0 and index.max() < 50


def test_threads_that_ask_together_agree(timer: Fake) -> None:
    found: list[str] = []

    def ask() -> None:
        found.append(backend.choose(577, 0.9, torch.float32, CPU))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["dense"] * 4


def test_the_command_prints_what_it_writes(
    timer: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "crossover.json"
    arguments = ["--tokens", "50", "577", "--dtype", "float32", "bfloat16"]
    assert main(["bench", "crossover", "--output", str(output), *arguments]) == 0
    text, table = capsys.readouterr().out, backend.read(output)
    assert describe(table) in text
    assert [(c["tokens"], c["dtype"]) for c in table["columns"]] == [
        (50, "float32"), (577, "float32"), (50, "bfloat16"), (577, "bfloat16"),
    ]  # fmt: skip
    row = next(line.split() for line in text.splitlines() if line.startswith("577"))
    assert row == ["577", "float32", *(f"{2 * rate:.2f}" for rate in backend.RATES), "50%",
                   *(f"{2 * rate:.2f}" for rate in backend.RATES)]  # fmt: skip
    calls = timer.calls
    assert backend.choose(577, 0.9, torch.float32, CPU) == "dense"
    assert timer.calls == calls  # kept for this machine, too
