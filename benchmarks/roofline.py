"""How far each part of a fast model is from the machine's limit, and what the calls cost.

    python benchmarks/roofline.py [--model NAME] [--keep 0.7] [--batch 8 1] [--output FILE]

Times of parts are those of their operators, by torch's profiler; "calls" is what is left of a pass
without the profiler. Multiply-accumulates are counted from the shapes that operators were given.
Prints Markdown, and writes JSON with `--output`. Random weights; the CPU alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import spot_vit  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from spot_vit.measure.peak import measured_peak  # noqa: E402
from spot_vit.nn.evidence import EvidenceHistory  # noqa: E402
from spot_vit.nn.fast_relevance import FastTokenRelevance  # noqa: E402
from spot_vit.nn.packed_patches import PackedPatches  # noqa: E402
from spot_vit.utils import machine  # noqa: E402
from spot_vit.utils.timing import keep_memory, take_turns  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

PASSES = 20
SCOPES = {  # what runs inside belongs to the part, whatever the operator
    "predictors": (FastTokenRelevance, "forward"),
    "evidence": (EvidenceHistory, "features"),
    "patches": (PackedPatches, "forward"),
}
OPERATORS = {
    "spot::packed_linear": "linear layers",
    "spot::attention_stats": "attention, statistics",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention, statistics",
    "aten::native_layer_norm": "norms",
    "spot::select_tokens": "selection, compaction",
    "spot::compact_tokens": "selection, compaction",
}
PRODUCTS = ("linear layers", "predictors", "patches", "attention, statistics")
ORDER = (*PRODUCTS, "norms", "evidence", "selection, compaction", "other operators")


@dataclass
class Part:
    """A part of a pass: milliseconds, and multiply-accumulates in units of 10^9."""

    ms: float = 0.0
    gmacs: float = 0.0


@contextmanager
def scopes() -> Iterator[None]:
    """Names what happens inside some methods; by class, so that fast models stay as fast."""
    before = {name: vars(kind)[method] for name, (kind, method) in SCOPES.items()}

    def named(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part {name}"):
                return before[name](*args, **kwargs)

        return call

    for name, (kind, method) in SCOPES.items():
        setattr(kind, method, named(name))
    try:
        yield
    finally:
        for name, (kind, method) in SCOPES.items():
            setattr(kind, method, before[name])


def macs(operator: str, shapes: Sequence[Sequence[int]]) -> int:
    """Multiply-accumulates of an operator call."""
    if operator == "spot::packed_linear":
        *rows, inputs = shapes[0]
        outputs = shapes[3][0] if shapes[3] else shapes[1][0] * shapes[1][2]
        return torch.Size(rows).numel() * inputs * outputs
    if operator == "spot::attention_stats":
        batch, tokens, heads, width = shapes[0]
        return 2 * batch * heads * tokens * tokens * width
    if operator.startswith("aten::_scaled_dot_product"):
        batch, heads, queries, width = shapes[0]
        return 2 * batch * heads * queries * shapes[1][2] * width
    return 0


def parts_of(model: Any, x: torch.Tensor, passes: int = PASSES) -> dict[str, Part]:
    """The parts of a pass, by torch's profiler."""
    with torch.inference_mode(), scopes():
        for _ in range(3):
            model(x)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            for _ in range(passes):
                model(x)
    found = {name: Part() for name in ORDER}
    for event in seen.events():
        if not event.name.startswith(("spot::", "aten::")):
            continue
        above, scope = event.cpu_parent, None
        while above is not None and scope is None:
            scope = above.name.removeprefix("part ") if above.name.startswith("part ") else None
            above = above.cpu_parent
        part = found[scope or OPERATORS.get(event.name, "other operators")]
        part.ms += event.self_cpu_time_total / 1e3 / passes
        part.gmacs += macs(event.name, event.input_shapes) / 1e9 / passes
    return found


def measure(name: str, keep: float, batch: int, rounds: int) -> dict[str, Any]:
    """Parts, whole passes and the machine's peak, for SPOT and for the dense model."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    model = dense if keep == 1 else spot_vit.sparsify(dense, keep=keep).eval()
    spot_vit.fast(model)
    x = torch.randn(batch, *model.default_cfg["input_size"])

    def run(_: int) -> Any:
        with torch.inference_mode():
            return model(x)

    whole = take_turns({"pass": run}, "cpu", rounds=rounds, warmup=3, turn=5)["pass"].median_ms
    parts = parts_of(model, x)
    calls = max(whole - sum(part.ms for part in parts.values()), 0.0)
    return {
        "model": name,
        "keep": keep,
        "batch": batch,
        "pass_ms": whole,
        "calls_ms": calls,
        "parts": {name: asdict(part) for name, part in parts.items()},
    }


def table(case: dict[str, Any], peak: float) -> str:
    """One case as Markdown."""
    whole = case["pass_ms"]
    lines = [
        f"**{case['model']}, ρ = {case['keep']}, batch {case['batch']}: {whole:.1f} ms**",
        "",
        "| part | ms | of the pass | GMACs | GMAC/s | of the peak | at the peak, ms |",
        "|---" * 7 + "|",
    ]
    for name, part in case["parts"].items():
        cells = [name, f"{part['ms']:.2f}", f"{part['ms'] / whole:.0%}", "", "", "", ""]
        if name in PRODUCTS and part["ms"]:
            speed = part["gmacs"] / part["ms"] * 1e3
            cells[3:] = [f"{part['gmacs']:.3f}", f"{speed:.0f}", f"{speed / peak:.0%}",
                         f"{part['gmacs'] / peak * 1e3:.2f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| calls, Python | {case['calls_ms']:.2f} | {case['calls_ms'] / whole:.0%} "
                 "| | | | |")  # fmt: skip
    total = sum(part["gmacs"] for part in case["parts"].values())
    lines.append(f"| all | {whole:.2f} | | {total:.3f} | {total / whole * 1e3:.0f} "
                 f"| {total / whole * 1e3 / peak:.0%} | {total / peak * 1e3:.2f} |")  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.7])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_memory()
    peaks = [measured_peak(torch.float32).gmacs_per_s for _ in range(3)]
    peak = statistics.median(peaks)
    cases = [
        measure(options.model, keep, batch, options.rounds)
        for batch in options.batch
        for keep in options.keep
    ]
    print(f"peak: {peak:.0f} GMAC/s in float32, {torch.get_num_threads()} threads\n")
    print("\n\n".join(table(case, peak) for case in cases))
    if options.output:
        result = {**machine.facts("cpu"), "peak_gmacs_per_s": peak, "cases": cases}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
