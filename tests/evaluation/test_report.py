"""The report of an evaluation: what is in the figures, and nothing that is not."""

from __future__ import annotations

from typing import Any

import pytest
from spot_vit.evaluation.report import as_table, describe


def row(name: str, top1: float, **changes: Any) -> dict[str, Any]:
    made = {
        "name": name, "model": "deit", "source": "runs/one", "keep": None, "attention_keep": None,
        "images": 240, "top1": top1, "top5": 0.99, "loss": 0.5, "mean_ap": None, "not_finite": 0,
        "difference": None, "real": None, "gmacs": 1.25, "images_per_second": 43.21,
        "time_ratio": None,
    }  # fmt: skip
    return made | changes


def summary(**changes: Any) -> dict[str, Any]:
    rows = [
        row("keep 1", 0.8125, keep=1.0, time_ratio=1.0),
        row(
            "keep 0.5", 0.80, keep=0.5, difference=[-0.0125, 0.006], gmacs=0.5,
            images_per_second=120.4, time_ratio=0.4,
        ),
    ]  # fmt: skip
    made = {
        "checkpoint": "runs/one",
        "model": "deit_tiny_patch16_224, SPOT",
        "data": {
            "name": "photos", "split": None, "images": 240, "num_classes": 10, "classes": None,
            "multi_label": False, "notes": [], "left_out": [], "unreadable": {},
        },
        "preprocessing": {"input_size": [3, 224, 224]},
        "rows": rows,
        "per_class": [
            {"class": f"c{c}", "images": 24, "shares": {"keep 1": 0.9, "keep 0.5": c / 10}}
            for c in range(10)
        ],
        "speed": {"batch": 32, "busy": None},
        "machine": {"threads": 2},
        "damage": None,
        "seconds": 1.0,
    }  # fmt: skip
    return made | changes


def table_of(text: str, first: str) -> list[str]:
    """Words of the line that starts with `first`."""
    return next(line for line in text.splitlines() if line.startswith(first)).split()


def test_figures_of_a_sweep() -> None:
    text = describe(summary())
    assert "240 images of photos, 10 classes, 224x224 pixels" in text
    assert table_of(text, "keep 1 ") == [
        "keep", "1", "81.25%", "99.00%", "0.5000", "1.250", "100%", "43.2", "x1.00",
    ]  # fmt: skip
    assert table_of(text, "keep 0.5") == [
        "keep", "0.5", "80.00%", "-1.25", "±", "0.60", "99.00%", "0.5000", "0.500", "40%", "120",
        "x2.50",
    ]  # fmt: skip
    assert "same weights with nothing removed" in text and "busy" not in text and "mAP" not in text
    assert "batches of 32, 2 CPU threads" in text
    assert table_of(text, "c3") == ["c3", "24", "90.0%", "30.0%"]


def test_a_busy_machine_is_said_and_no_ratio() -> None:
    found = summary(speed={"batch": 32, "busy": "other processes used 1.5 CPUs"})
    for one in found["rows"]:
        one["time_ratio"] = None
    text = describe(found)
    assert "images/s*" in text and "busy machine" in text and "used 1.5 CPUs" in text
    assert table_of(text, "keep 0.5")[-1] == "120"


def test_one_model_is_compared_with_nothing() -> None:
    text = describe(summary(rows=[row("deit", 0.5)], per_class=[], speed=None))
    assert "against" not in text and "images/s" not in text and "nothing removed" not in text


def test_columns_that_say_nothing_are_left_out() -> None:
    found = summary()
    found["data"]["num_classes"] = 3
    for one in found["rows"]:
        one["gmacs"] = None
    text = describe(found)
    assert "top-5" not in text and "GMACs" not in text


def test_several_labels() -> None:
    found = summary()
    found["data"]["multi_label"] = True
    for one in found["rows"]:
        one["mean_ap"] = 0.625
    text = describe(found)
    assert table_of(text, "keep 0.5")[2] == "62.50%" and "binary cross-entropy" in text
    assert "average precision of each class" in text


def test_bad_files_and_broken_logits_are_named() -> None:
    found = summary()
    found["data"]["unreadable"] = {f"{i}.jpg": "truncated" for i in range(12)}
    found["data"]["notes"] = ["1 file is no picture: notes.txt"]
    found["rows"][1] |= {"not_finite": 3, "loss": None}
    text = describe(found)
    assert "12 images were left out, since unreadable: 0.jpg (truncated), 1.jpg" in text
    assert "and 2 more" in text and "notes.txt" in text
    assert "keep 0.5: logits of 3 images are not finite" in text


@pytest.mark.parametrize("every", [False, True])
def test_of_many_classes_the_weakest(every: bool) -> None:
    found = summary()
    found["per_class"] = [
        {"class": f"c{c}", "images": 5, "shares": {"keep 1": 0.9, "keep 0.5": 1 - c / 50}}
        for c in range(40)
    ] + [{"class": "absent", "images": 0, "shares": {"keep 1": None, "keep 0.5": None}}]
    text = describe(found, every)
    shown = [
        line.split()[0] for line in text.splitlines() if line.startswith("c") and " 5 " in line
    ]
    assert shown == ([f"c{c}" for c in range(40)] if every else ["c39", "c38", "c37", "c36", "c35"])
    assert ("--per-class" in text) is not every
    assert "1 class of the model has no image here" in text and "absent" not in text


def test_damage() -> None:
    errors = {
        "fog": {"keep 1": [0.2, 0.4], "keep 0.5": [0.3, 0.5]},
        "snow": {"keep 1": [0.1, 0.3], "keep 0.5": [0.2, 0.4]},
    }
    damage = {
        "source": "done here", "severities": [1, 3], "kinds": ["fog", "snow"], "errors": errors,
        "top1": {"keep 1": 0.75, "keep 0.5": 0.65}, "difference": {"keep 0.5": [-0.1, 0.02]},
        "mce": {"keep 1": 1.0, "keep 0.5": 1.375}, "relative_to": "keep 1",
    }  # fmt: skip
    text = describe(summary(damage=damage))
    assert "severities 1, 3 (done here)" in text
    assert table_of(text, "fog") == ["fog", "70.0%", "60.0%"]
    assert table_of(text, "mean")[1:] == ["75.0%", "65.0%"]
    assert table_of(text, "mCE ")[1:] == ["100.0", "137.5"] and "keep 1 = 100" in text
    assert "-10.00 ± 2.00" in text


def test_table_for_csv() -> None:
    rows = as_table(summary())
    assert len(rows) == 2 and rows[0].keys() == rows[1].keys()
    assert rows[1]["difference"] == -0.0125 and rows[1]["difference_standard_error"] == 0.006
    assert rows[0]["difference"] is None and rows[1]["keep"] == 0.5
