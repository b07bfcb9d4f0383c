"""How long threads of OpenMP should spin: time on an idle machine and beside busy neighbours.

    python benchmarks/wait_policy.py [--rounds 5] [--seconds 4] [--busy 1] [--policy NAME...]

Every figure is of a fresh process, since the library reads its policy once. Policies take turns,
round after round; ratios are of the same round, to the library's own policy on the idle machine.
Prints the table, and writes it as JSON with `--output`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from spot_vit.utils.threads import WAIT_POLICY  # noqa: E402  (nothing above imports torch)

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 10000, 30000, 100000)},
    "commands": WAIT_POLICY,
}
BASELINE = "default"
IDLE, BUSY = "idle", "busy"

Figures = dict[str, dict[str, list[dict[str, float]]]]
"""By condition and policy: milliseconds by workload, one dictionary a round."""


def workloads() -> dict[str, Callable[[], Any]]:
    """What is timed: inference of DeiT-S, and the demonstration's training step."""
    import timm
    import torch
    from spot_vit.demos.setup import Recipe, build_dense

    torch.manual_seed(0)
    deit = timm.create_model("deit_small_patch16_224").eval()
    images = torch.randn(8, 3, 224, 224)
    recipe = Recipe()
    model: Any = build_dense(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = recipe.digits("train", recipe.batch_size).batch(range(recipe.batch_size))

    def infer(count: int) -> None:
        with torch.inference_mode():
            deit(images[:count])

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.image), batch.label).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {
        "DeiT-S, batch 1": lambda: infer(1),
        "DeiT-S, batch 8": lambda: infer(8),
        "training step": train,
    }


def time_here(seconds: float) -> dict[str, float]:
    """Median milliseconds of each workload in this process, as it is."""
    found = {}
    for name, run in workloads().items():
        run()
        run()
        times: list[float] = []
        stop = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < stop:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        found[name] = 1e3 * statistics.median(times)
    return found


def time_there(policy: dict[str, str], seconds: float, threads: int) -> dict[str, float]:
    """The same in a fresh process under a policy."""
    names = {name for one in POLICIES.values() for name in one}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {**policy, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--here", "--seconds", str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that use a CPU each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def table(figures: Figures, busy: int) -> str:
    """The figures as a table in Markdown."""
    names = list(next(iter(figures[IDLE].values()))[0])
    base = figures[IDLE][BASELINE]
    lines = [
        f"median ms of the round's time by {BASELINE!r} when idle; busy: {busy} CPUs taken",
        "",
        "| policy | " + " | ".join(f"{name}, {c}" for name in names for c in figures) + " |",
        "|---" * (1 + len(names) * len(figures)) + "|",
    ]
    for policy in figures[IDLE]:
        cells = []
        for name in names:
            for rounds in figures.values():
                times = [one[name] for one in rounds[policy]]
                pairs = zip(times, base, strict=True)
                ratio = statistics.median(own / other[name] for own, other in pairs)
                cells.append(f"{statistics.median(times):.1f} ({ratio:.2f} x)")
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="for one workload")
    parser.add_argument("--busy", type=int, default=1, help="CPUs that others use")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.here:
        print(json.dumps(time_here(arguments.seconds)))
        return 0
    chosen = [BASELINE, *(name for name in arguments.policy if name != BASELINE)]
    figures: Figures = {c: {name: [] for name in chosen} for c in (IDLE, BUSY)}
    for number in range(arguments.rounds):
        for condition, rounds in figures.items():
            with neighbours(arguments.busy if condition == BUSY else 0):
                for name in chosen:
                    found = time_there(POLICIES[name], arguments.seconds, arguments.threads)
                    rounds[name].append(found)
                    print(number, condition, name, found, file=sys.stderr, flush=True)
    print(table(figures, arguments.busy))
    if arguments.output:
        from spot_vit.utils.files import save_json
        from spot_vit.utils.machine import facts

        about = {**facts(), "threads": arguments.threads}
        save_json(
            arguments.output,
            {"machine": about, "policies": POLICIES, "busy": arguments.busy, "figures": figures},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
