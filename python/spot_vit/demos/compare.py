"""`spot demo compare`: four ways to select tokens, at the same cost, steps, images and seeds."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spot_vit.config.methods import METHODS
from spot_vit.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedDigits
from spot_vit.demos.setup import Recipe, build_dense, trained_dense, trained_sparse
from spot_vit.evaluation.accuracy import evaluate
from spot_vit.evaluation.foreground import foreground_kept
from spot_vit.evaluation.statistics import difference, over_seeds, signed, spread
from spot_vit.measure.budget import solve_keep
from spot_vit.measure.flops import count_flops
from spot_vit.models.convert import sparsify
from spot_vit.utils.files import save_json
from spot_vit.utils.machine import facts
from spot_vit.utils.tables import format_table

OURS = "spot"
INPUT = (1, 64, 64)


@dataclass(frozen=True)
class Setting:
    """Models, data and seeds of the comparison (our choice).

    Attributes:
        recipe: sizes, rates and data set.
        shares: GMACs of the sparse models as shares of the dense model's.
        seeds: number of seeds, counted up from the first one.
        damaged_images: test images for each corruption and severity.
        severities: of the corruptions.
    """

    recipe: Recipe
    shares: Sequence[float] = (0.5,)
    seeds: int = 3
    damaged_images: int = 360
    severities: Sequence[int] = SEVERITIES


# Four whole digits, one of them asked for: no patch can know by itself whether it matters.
FULL = Setting(Recipe(steps=2800, data={"num_distractors": 3, "num_fragments": 0}))
FAST = Setting(
    dataclasses.replace(FULL.recipe, steps=4, extra_steps=2, batch_size=8, test_images=60),
    damaged_images=12,
    severities=(2,),
)


def run(
    output: Path, *, quick: bool = False, seed: int = 0, seeds: int = 3, threads: int = 2
) -> dict[str, Any]:
    """Trains and measures everything, prints the tables, and writes compare.json.

    Every method starts from the same dense model of its seed, sees the same images for the same
    number of steps, has the same loss, and keeps as many tokens as the cost allows. Trained models
    are kept in `output`: an interrupted run goes on where it stopped.

    Args:
        output: folder for the files, made when it is not there.
        quick: a run of seconds that only shows that everything works.
        seed: the first one.
        seeds: how many.
        threads: CPU threads that torch may use.

    Returns:
        The content of compare.json.
    """
    started = time.perf_counter()
    torch.set_num_threads(threads)
    setting = dataclasses.replace(FAST if quick else FULL, seeds=seeds)
    recipe = setting.recipe
    keeps = {
        (method, share): matching_keep(recipe, method, share)
        for share in setting.shares
        for method in METHODS
    }
    dense_runs: list[Measured] = []
    runs: dict[tuple[str, float], list[Measured]] = {}
    for current in range(seed, seed + setting.seeds):
        dense = trained_dense(output, recipe, current)
        dense_runs.append(_measure(dense, setting, f"dense, seed {current}"))
        for (method, share), keep in keeps.items():
            name = f"{method}-{share}-seed{current}"
            path = output / f"{name}.safetensors"
            model = trained_sparse(path, dense, recipe, current, method=method, keep=keep)
            runs.setdefault((method, share), []).append(_measure(model, setting, name))
    summary: dict[str, Any] = {
        "setting": dataclasses.asdict(setting),
        "first_seed": seed,
        "quick": quick,
        "threads": threads,
        "machine": facts(),
        "dense": _figures(dense_runs),
        "rows": [
            {
                "method": method,
                "share": share,
                **_figures(measured),
                **_against(runs[OURS, share], measured, setting),
            }
            for (method, share), measured in runs.items()
        ],
        "seconds": time.perf_counter() - started,
    }
    save_json(output / "compare.json", summary)
    print(f"\n{describe(summary)}\n\n{summary['seconds'] / 60:.1f} minutes; written: ", end="")
    print(output / "compare.json")
    return summary


def matching_keep(recipe: Recipe, method: str, share: float) -> float:
    """The largest ρ, in thousandths, at which the method costs at most that share of dense."""
    model: Any = build_dense(recipe)
    gmacs = share * count_flops(model, INPUT).total / 1e9
    sparsify(model, method=method, at=list(recipe.at))
    return solve_keep(model, {"gmacs": gmacs, "input_size": INPUT})


@dataclass
class Measured:
    """One trained model, measured.

    Attributes:
        gmacs: multiply-accumulates per image, 1e9.
        keep: ρ, None for the dense model.
        correct: bool [images], right on clean test images.
        damaged: for each corruption bool [severities, images].
        foreground: share of the foreground patches that each stage keeps.
        random: the same for patches drawn at random.
    """

    gmacs: float
    keep: float | None
    correct: Tensor
    damaged: dict[str, Tensor]
    foreground: list[float]
    random: list[float]


def _measure(model: Any, setting: Setting, name: str) -> Measured:
    torch.manual_seed(0)  # random selection draws here too; whether it was just trained is the same
    test = setting.recipe.digits("test", setting.recipe.test_images)
    loader = DataLoader(test, batch_size=120)
    few = setting.recipe.digits("test", setting.damaged_images)
    damaged = {
        kind: torch.stack(
            [
                evaluate(
                    model,
                    DataLoader(CorruptedDigits(few, kind, severity), batch_size=120),
                    f"{name}: {kind} {severity}",
                ).correct
                for severity in setting.severities
            ]
        )
        for kind in CORRUPTIONS
    }
    keep, foreground, random = None, [1.0], [1.0]
    if hasattr(model, "spot_config"):
        kept = foreground_kept(model, loader, f"{name}: foreground")
        keep, foreground, random = model.spot_config.keep, kept.foreground, kept.random
    correct = evaluate(model, loader, f"{name}: test").correct
    gmacs = count_flops(model, INPUT).total / 1e9
    return Measured(gmacs, keep, correct, damaged, foreground, random)


def _figures(measured: Sequence[Measured]) -> dict[str, Any]:
    """Figures of one row of the tables: a list holds one entry per seed."""
    return {
        "gmacs": measured[0].gmacs,
        "keep": measured[0].keep,
        "top1": [one.correct.double().mean().item() for one in measured],
        "damaged": {
            kind: [one.damaged[kind].double().mean().item() for one in measured]
            for kind in CORRUPTIONS
        },
        "foreground": [one.foreground for one in measured],
        "random": measured[0].random,
    }


def _against(
    spot: Sequence[Measured], other: Sequence[Measured], setting: Setting
) -> dict[str, Any]:
    """SPOT's accuracy minus the other's, clean and damaged, each with its standard error."""
    test = setting.recipe.digits("test", setting.recipe.test_images)
    views = {
        "spot_leads": lambda one: one.correct.double(),
        "spot_leads_damaged": lambda one: (
            torch.cat([*one.damaged.values()]).double().mean(dim=0)  # over kinds and severities
        ),
    }
    found = {}
    for name, view in views.items():
        ours, theirs = (torch.stack([view(one) for one in side]) for side in (spot, other))
        found[name] = difference(ours, theirs, test.sources(range(ours.shape[1])))
    return found


def describe(summary: Mapping[str, Any]) -> str:
    """Tables and verdict from the content of compare.json alone."""
    dense, rows, setting = summary["dense"], summary["rows"], summary["setting"]
    accuracy = [
        [
            "",
            "GMACs/image",
            "ρ",
            "accuracy",
            "SPOT leads by",
            "damaged",
            "SPOT leads by",
            "foreground kept",
            "at random",
        ]
    ]
    for row in [{"method": "dense", **dense}, *rows]:
        cells = [_label(row["method"])]
        cells.append(f"{row['gmacs']:.4f} {row['gmacs'] / dense['gmacs']:4.0%}")
        cells.append("" if row["keep"] is None else f"{row['keep']:.3f}")
        for figure, lead in (("top1", "spot_leads"), ("damaged", "spot_leads_damaged")):
            values = row[figure]
            if figure == "damaged":
                values = [statistics.mean(seed) for seed in zip(*values.values(), strict=True)]
            cells.append(spread(values))
            shown = row["method"] not in ("dense", OURS)
            cells.append(signed(row[lead]) if shown else "")
        stages = zip(*row["foreground"], strict=True)
        cells.append(", ".join(spread(stage, 0) for stage in stages))
        cells.append(", ".join(f"{share:.0%}" for share in row["random"]))
        accuracy.append(cells)
    damage = [["damaged", *CORRUPTIONS]]
    for row in [{"method": "dense", **dense}, *rows]:
        share = "" if row["method"] == "dense" else f" at {row['share']:.0%}"
        cells = [spread(row["damaged"][kind]) for kind in CORRUPTIONS]
        damage.append([_label(row["method"]) + share, *cells])
    seeds, recipe = setting["seeds"], setting["recipe"]
    strengths = len(setting["severities"])
    note = ""
    if summary["quick"]:
        note = "\n\nA quick run: nothing is trained enough for the figures to mean anything."
    judged = "\n".join(verdict(rows))
    return f"""{format_table(accuracy)}

accuracy         on {recipe["test_images"]} images, {over_seeds(seeds)}
damaged          the same, mean over {len(CORRUPTIONS)} corruptions at {strengths} severities
SPOT leads by    paired difference in points and its standard error, over images and seeds
foreground kept  patches of the digit asked for that survive each stage, in the same way

{format_table(damage)}

{judged}{note}"""


def _label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where SPOT leads, ties (within two standard errors) and trails."""
    lines = []
    for share in dict.fromkeys(row["share"] for row in rows):
        for what, lead in (("clean", "spot_leads"), ("damaged", "spot_leads_damaged")):
            found: dict[str, list[str]] = {"leads": [], "ties with": [], "trails": []}
            for row in rows:
                if row["share"] != share or row["method"] == OURS:
                    continue
                mean, error = row[lead]
                word = "ties with"
                if abs(mean) > 2 * error:
                    word = "leads" if mean > 0 else "trails"
                found[word].append(f"{_label(row['method'])} ({signed(row[lead])})")
            said = "; ".join(f"{word} {', '.join(names)}" for word, names in found.items() if names)
            lines.append(f"At {share:.0%} of the dense GMACs, {what} images: SPOT {said}.")
    return lines
