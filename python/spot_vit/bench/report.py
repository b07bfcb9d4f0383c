"""A benchmark as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spot_vit.utils.tables import format_table

PARTS = {"attention": "attention", "mlp": "MLP", "decision": "decisions"}


def describe(result: Mapping[str, Any]) -> str:
    """The tables of a benchmark, from the content of its JSON file alone."""
    model, machine, peak = (result[name] for name in ("model", "machine", "peak"))
    image = "x".join(map(str, model["image"]))
    head = [
        f"{model['name']}, {image}, {model['parameters'] / 1e6:.1f} M parameters, "
        f"{result['settings']['dtype']}",
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; peak "
        f"{peak['gmacs_per_s']:.0f} GMAC/s (product of {peak['size']} x {peak['size']} matrices, "
        f"{peak['by']})",
    ]
    parts = ["\n".join(head)]
    for batch in result["batches"]:
        parts.append(f"batch {batch['batch']}\n{_table(batch)}")
        parts += _remark(batch)
    for layers in result["layers"]:
        title = f"{layers['model']}, layer by layer, batch {layers['batch']}"
        parts.append(f"{title}\n{_layers(layers)}")
        parts += _remark(layers)
    parts.append(
        "speedup: time of the dense model in eager mode by this one's; of peak: GMAC/s by the "
        "machine's;\nMB: what a pass takes at most, besides weights; graphs: compiled by the first "
        "pass + later"
    )
    if result["absent"]:
        lines = (f"  {name}: {reason}" for name, reason in result["absent"].items())
        parts.append("not there:\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _remark(measured: Mapping[str, Any]) -> list[str]:
    """Why nothing is compared, where that is so."""
    reason = measured["contended"]
    return [] if reason is None else [f"no ratios: the machine was busy: {reason}"]


def _table(batch: Mapping[str, Any]) -> str:
    head = "side GMACs tokens ms p10 p90 images/s speedup GMAC/s of_peak MB graphs"
    rows = [[word.replace("_", " ") for word in head.split()]]
    for row in batch["rows"]:
        graphs = "" if row["graphs"] is None else str(row["graphs"])
        if row["recompilations"]:
            graphs += f"+{row['recompilations']}"
        rows.append(
            [
                row["name"],
                f"{row['gmacs']:.3g}",
                _number(row["tokens"], ".0f"),
                f"{row['median_ms']:.3g}",
                f"{row['p10_ms']:.3g}",
                f"{row['p90_ms']:.3g}",
                f"{row['images_per_s']:.1f}",
                _number(row["speedup"], ".2f"),
                f"{row['gmacs_per_s']:.1f}",
                _number(row["share_of_peak"], ".0%"),
                "" if row["memory_bytes"] is None else _megabytes(row["memory_bytes"]),
                graphs,
            ]
        )
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return format_table(rows)


def _layers(layers: Mapping[str, Any]) -> str:
    """A row for each part, then sums."""
    runtimes = layers["runtimes"]
    first = next(iter(runtimes.values()))
    rows = [["layer", "GMACs"]]
    for name in runtimes:
        rows[0] += [f"{name} ms", "share", "GMAC/s"]
    for number, part in enumerate(first):
        label = f"{part['layer']} {part['part']}".strip()
        rows.append(
            _layer_row(label, {n: [parts[number]] for n, parts in runtimes.items()}, layers)
        )
    for kind, words in PARTS.items():
        own = {n: [p for p in parts if p["part"] == kind] for n, parts in runtimes.items()}
        if own[next(iter(own))]:
            rows.append(_layer_row(f"all {words}", own, layers))
    rows.append(_layer_row("whole model", runtimes, layers))
    return format_table(rows)


def _layer_row(
    label: str, runtimes: Mapping[str, Sequence[Mapping[str, Any]]], layers: Mapping[str, Any]
) -> list[str]:
    cells = [label]
    for number, parts in enumerate(runtimes.values()):
        macs = sum(part["gmacs"] for part in parts)
        if number == 0:
            cells.append(f"{macs:.3f}")
        ms = sum(part["ms"] for part in parts)
        rate = layers["batch"] * macs / (ms / 1e3) if ms else 0.0
        shares = [part["share"] for part in parts]
        share = "" if None in shares else f"{sum(shares):.1%}"
        cells += [f"{ms:.2f}", share, f"{rate:.1f}"]
    return cells


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f}" if size >= 1e7 else f"{size / 1e6:.1f}"
