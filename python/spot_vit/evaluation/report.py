"""What an evaluation found, as text and as tables, from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from spot_vit.evaluation.statistics import signed
from spot_vit.utils.tables import format_table

Summary = Mapping[str, Any]
FEW = 20  # classes that are all printed
WEAKEST = 5  # of many classes, how many are printed
TOP5_FROM = 6  # with five classes or fewer everything is among the best five
NAMED = 10  # files that are named in print


def describe(summary: Summary, every_class: bool = False) -> str:
    """Everything as text.

    Args:
        summary: as `spot eval` writes it.
        every_class: print all classes, however many there are.
    """
    parts = [
        _heading(summary),
        *_warnings(summary),
        format_table(_rows(summary)),
        _legend(summary),
        _classes(summary, every_class),
        _damage(summary),
    ]
    return "\n\n".join(part for part in parts if part)


def _heading(summary: Summary) -> str:
    data = summary["data"]
    sides = summary["preprocessing"]["input_size"]
    size = "x".join(map(str, sides[1:]))
    return (
        f"{summary['checkpoint']} ({summary['model']})\n"
        f"{data['images']} images of {data['name']}, {data['num_classes']} classes, {size} pixels"
    )


def _warnings(summary: Summary) -> list[str]:
    data, found = summary["data"], list(summary["data"]["notes"])
    if data["unreadable"]:
        names = [f"{name} ({reason})" for name, reason in data["unreadable"].items()]
        found.append(f"{_files(len(names))} left out, since unreadable: {_some(names)}")
    for row in summary["rows"]:
        if row["not_finite"]:
            found.append(
                f"{row['name']}: logits of {row['not_finite']} images are not finite; they count "
                "as wrong, and there is no loss"
            )
    return ["\n".join(f"! {line}" for line in found)] if found else []


def _files(count: int) -> str:
    return "1 image was" if count == 1 else f"{count} images were"


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _share(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _rows(summary: Summary) -> list[list[str]]:
    """The main table; columns that say nothing are left out."""
    rows, several = summary["rows"], summary["data"]["multi_label"]
    busy = "*" if summary["speed"] and summary["speed"]["busy"] else ""
    columns: dict[str, list[str]] = {"": [row["name"] for row in rows]}
    if several:
        columns["mAP"] = [_share(row["mean_ap"]) for row in rows]
    columns["top-1"] = [_share(row["top1"]) for row in rows]
    if len(rows) > 1:
        columns[f"against {rows[0]['name']}"] = ["", *(signed(r["difference"]) for r in rows[1:])]
    if summary["data"]["num_classes"] >= TOP5_FROM:
        columns["top-5"] = [_share(row["top5"]) for row in rows]
    columns["loss"] = ["" if row["loss"] is None else f"{row['loss']:.4f}" for row in rows]
    if rows[0]["real"]:
        columns["ReaL top-1"] = [_share(row["real"]["top1"]) for row in rows]
    columns["GMACs/image"] = [_cost(row, rows[0]) for row in rows]
    if summary["speed"]:
        columns[f"images/s{busy}"] = [_speed(row, len(rows)) for row in rows]
    kept = {title: cells for title, cells in columns.items() if any(cells)}
    return [list(kept), *map(list, zip(*kept.values(), strict=True))]


def _cost(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    if row["gmacs"] is None:
        return ""
    share = f" {row['gmacs'] / first['gmacs']:4.0%}" if first["gmacs"] else ""
    digits = 3 if (first["gmacs"] or row["gmacs"]) >= 1 else 4
    return f"{row['gmacs']:.{digits}f}{share}"


def _speed(row: Mapping[str, Any], rows: int) -> str:
    value = row["images_per_second"]
    text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    if rows == 1 or row["time_ratio"] is None:
        return text
    return f"{text} x{1 / row['time_ratio']:.2f}"


def _legend(summary: Summary) -> str:
    """How to read the table: only what is in it."""
    rows, speed = summary["rows"], summary["speed"]
    lines = {}
    if len(rows) > 1:
        name = rows[0]["name"]
        lines[f"against {name}"] = (
            "difference of top-1 on the same images and its standard error, points"
        )
        if rows[0]["source"] != summary["checkpoint"]:
            lines[name] = f"{rows[0]['source']} ({rows[0]['model']})"
        elif rows[0]["keep"] == 1:
            lines[name] = "the same weights with nothing removed; --baseline names another model"
    if summary["data"]["multi_label"]:
        lines["mAP"] = "mean over classes of the average precision"
        lines["top-1"] = "share of images whose highest scoring class is one of theirs"
        lines["loss"] = "binary cross-entropy"
    if rows[0]["real"]:
        lines["ReaL top-1"] = (
            f"by reassessed labels, of the {rows[0]['real']['images']} images that have any"
        )
    if any(row["gmacs"] is not None for row in rows):
        lines["GMACs/image"] = (
            "multiply-accumulates of everything, predictors and statistics included"
        )
    if speed:
        busy = "*" if speed["busy"] else ""
        threads = summary["machine"]["threads"]
        where = summary["machine"].get("gpu") or f"{threads} CPU threads"
        by = "" if busy or len(rows) == 1 else f"; x: by that of {rows[0]['name']}"
        lines[f"images/s{busy}"] = f"forward passes of batches of {speed['batch']}, {where}{by}"
        if busy:
            lines["*"] = f"a busy machine, so no ratio is stated: {speed['busy']}"
    width = max(map(len, lines), default=0)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines.items())


def _classes(summary: Summary, every_class: bool) -> str:
    classes = [one for one in summary["per_class"] if one["images"]]
    names = [row["name"] for row in summary["rows"]]
    all_of_them = every_class or len(classes) <= FEW
    shown = classes
    if not all_of_them:
        shown = sorted(classes, key=lambda one: one["shares"][names[-1]] or 0)[:WEAKEST]
    measure = "average precision" if summary["data"]["multi_label"] else "top-1"
    table = [["class", "images", *names]]
    for one in shown:
        shares = [_share(one["shares"][name], 1) for name in names]
        table.append([one["class"], str(one["images"]), *shares])
    empty = len(summary["per_class"]) - len(classes)
    title = f"{measure} of each class"
    if not all_of_them:
        title = f"the {WEAKEST} classes with the lowest {measure} at {names[-1]}"
    more = [] if all_of_them else [f"{len(classes)} classes in all: --per-class prints every one"]
    if empty:
        none = "1 class of the model has" if empty == 1 else f"{empty} classes of the model have"
        more.append(f"{none} no image here")
    return "\n".join([f"{title}\n", format_table(table), *more])


def _damage(summary: Summary) -> str:
    found = summary["damage"]
    if not found:
        return ""
    names = [row["name"] for row in summary["rows"]]
    table = [["damage", *names]]
    for kind, errors in found["errors"].items():
        table.append([kind, *(_share(1 - statistics.mean(errors[name]), 1) for name in names)])
    table.append(["mean", *(_share(found["top1"][name], 1) for name in names)])
    if found["mce"]:
        table.append(["mCE", *(f"{100 * found['mce'][name]:.1f}" for name in names)])
    if found["difference"]:
        leads = (signed(found["difference"][name]) for name in names[1:])
        table.append([f"against {names[0]}", "", *leads])
    severities = ", ".join(map(str, found["severities"]))
    lines = [f"top-1 on damaged images, mean over severities {severities} ({found['source']})\n"]
    lines.append(format_table(table))
    if found["mce"]:
        lines.append(f"mCE: mean corruption error, {found['relative_to']} = 100; lower is better")
    return "\n".join(lines)


def as_table(summary: Summary) -> list[dict[str, Any]]:
    """The rows as flat dictionaries with the same keys, for a CSV file."""
    flat = []
    for row in summary["rows"]:
        difference = row["difference"] or (None, None)
        real = row["real"] or {}
        flat.append(
            {
                "model": row["name"],
                "keep": row["keep"],
                "attention_keep": row["attention_keep"],
                "images": row["images"],
                "top1": row["top1"],
                "top5": row["top5"],
                "loss": row["loss"],
                "mean_ap": row["mean_ap"],
                "difference": difference[0],
                "difference_standard_error": difference[1],
                "real_top1": real.get("top1"),
                "real_top5": real.get("top5"),
                "gmacs": row["gmacs"],
                "images_per_second": row["images_per_second"],
                "time_ratio": row["time_ratio"],
            }
        )
    return flat
