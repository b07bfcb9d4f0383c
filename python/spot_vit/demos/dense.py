"""`spot demo dense`: what a dense head makes of a sparse backbone's maps, by what fills them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spot_vit.data.digits import DigitBatch
from spot_vit.demos.setup import Recipe, trained_dense, trained_sparse
from spot_vit.evaluation.statistics import over_seeds, signed, spread
from spot_vit.nn.exit_lens import ExitLens
from spot_vit.utils.files import save_json
from spot_vit.utils.machine import facts
from spot_vit.utils.tables import format_table

CLASSES = 11  # of a patch: background, or the digit it shows
HEADS = {"linear": "linear head", "two_layers": "two layers", "given": "dense model's"}

RECIPE = Recipe(width=64, steps=1000, extra_steps=250, keep=0.5)


@dataclass(frozen=True)
class Setting:
    """Sizes of the measurement, found by trial (our choice)."""

    recipe: Recipe = RECIPE
    head_images: int = 2400
    epochs: int = 6
    patches: int = 2048  # of a step
    linear_lr: float = 2e-2
    lr: float = 5e-3


QUICK = Setting(
    Recipe(width=16, steps=2, extra_steps=2, batch_size=4, keep=0.5, test_images=30),
    head_images=24,
    epochs=1,
    patches=512,
)


@dataclass(frozen=True)
class Variant:
    """How the map of the last block is made."""

    model: str = "SPOT"
    fill: str = "last"
    norm: str = "no"  # "no", "all", or "kept": the places of dropped tokens as they are
    lens: bool = False


VARIANTS = (
    Variant("dense"),
    Variant("dense", norm="all"),
    *(Variant(norm=norm) for norm in ("no", "all", "kept")),
    Variant(lens=True),
    Variant(norm="all", lens=True),
    *(Variant(fill=fill, norm=norm) for fill in ("nearest", "zero") for norm in ("no", "all")),
)


@dataclass
class Maps:
    """Maps of the last block, on the CPU.

    Attributes:
        x: float32 [B, N, C].
        masks: K cumulative masks [B, N].
        target: int64 [B, N], the class of each patch.
    """

    x: Tensor
    masks: list[Tensor]
    target: Tensor


def run(
    output: Path, *, quick: bool = False, seed: int = 0, seeds: int = 3, threads: int = 2
) -> dict[str, Any]:
    """Trains and measures, prints the table, and writes dense.json.

    The backbones are trained to classify and rest; heads are trained on their maps. Trained
    backbones are kept in `output`: an interrupted run goes on where it stopped.

    Args:
        output: folder for the files, made when it is not there.
        quick: a run of seconds that only shows that everything works.
        seed: the first one.
        seeds: how many.
        threads: CPU threads that torch may use.

    Returns:
        The content of dense.json.
    """
    started = time.perf_counter()
    torch.set_num_threads(threads)
    setting = QUICK if quick else Setting()
    scores = [_one_seed(output, setting, current) for current in range(seed, seed + seeds)]
    summary: dict[str, Any] = {
        "setting": asdict(setting),
        "seeds": [*range(seed, seed + seeds)],
        "quick": quick,
        "threads": threads,
        "machine": facts(),
        "foreground_kept": [kept for _, kept in scores],
        "rows": [
            {**asdict(variant), **{head: [one[i][head] for one, _ in scores] for head in HEADS}}
            for i, variant in enumerate(VARIANTS)
        ],
        "seconds": time.perf_counter() - started,
    }
    save_json(output / "dense.json", summary)
    minutes = summary["seconds"] / 60
    print(f"\n{describe(summary)}\n\n{minutes:.1f} minutes; written: {output / 'dense.json'}")
    return summary


def _one_seed(
    output: Path, setting: Setting, seed: int
) -> tuple[list[dict[str, list[float]]], float]:
    """Scores of every variant by head; and the share of the foreground that SPOT keeps."""
    recipe = setting.recipe
    dense = trained_dense(output, recipe, seed)
    path = output / f"sparse-seed{seed}.safetensors"
    sparse = trained_sparse(path, dense, recipe, seed, keep=recipe.keep, train_decision="topk")
    models = {"dense": dense, "SPOT": sparse}
    fresh = recipe.digits("train", setting.head_images, seed=1_000 + seed)  # no image comes back
    learn = fresh.batch(range(len(fresh)))
    test = recipe.digits("test", recipe.test_images).batch(range(recipe.test_images))

    def maps(variant: Variant) -> tuple[Maps, Maps]:
        model = models[variant.model]
        return maps_of(model, learn, variant), maps_of(model, test, variant)

    places = maps(Variant())[1]
    kept = places.masks[-1] > 0.5  # at which every row is scored
    given, goals = {}, {}
    for variant in VARIANTS[:2]:
        goals[variant.norm] = maps(variant)[0]
        given[variant.norm] = _head(goals[variant.norm], setting, seed, hidden=True)
    scores = []
    for variant in VARIANTS:
        here, there = maps(variant)
        norm = "no" if variant.norm == "no" else "all"
        goal = goals[norm].x if variant.lens else None
        heads = {
            "linear": _head(here, setting, seed, hidden=False, lens=variant.lens),
            "two_layers": _head(here, setting, seed, hidden=True, lens=variant.lens),
            "given": _Adapted(_lens(here, goal, setting, seed), given[norm].head),
        }
        scores.append({name: _score(head, there, kept) for name, head in heads.items()})
    return scores, kept[places.target > 0].double().mean().item()


@torch.no_grad()
def maps_of(model: nn.Module, data: DigitBatch, variant: Variant, size: int = 120) -> Maps:
    """Maps of the last block, as a variant makes them."""
    maps, decided = [], []
    for image in data.image.split(size):
        asked: dict[str, Any] = {"norm": variant.norm != "no"}
        if variant.model == "dense":
            (found,) = _last_map(model, image, **asked)
        else:
            (found,), out = _last_map(model, image, fill=variant.fill, aux=True, **asked)
            decided.append(out.masks)
            if variant.norm == "kept":
                (plain,) = _last_map(model, image, fill=variant.fill, kept=out.index)
                found = torch.where(out.masks[-1][..., None] > 0.5, found, plain)
        maps.append(found)
    masks = [torch.cat(stage) for stage in zip(*decided, strict=True)]
    return Maps(torch.cat(maps), masks, data.foreground * (data.label[:, None] + 1))


def _last_map(model: Any, image: Tensor, **options: Any) -> Any:
    return model.forward_intermediates(
        image, indices=1, output_fmt="NLC", intermediates_only=True, **options
    )


class _Adapted(nn.Module):
    """A head [patches, C] to [patches, classes] behind a lens, or behind nothing."""

    def __init__(self, lens: ExitLens | None, head: nn.Module) -> None:
        super().__init__()
        self.lens, self.head = lens, head

    def forward(self, x: Tensor, masks: list[Tensor]) -> Tensor:
        """Maps [B, N, C] to logits [B, N, classes]."""
        x = x if self.lens is None else self.lens(x, masks)
        return self.head(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _head(maps: Maps, setting: Setting, seed: int, *, hidden: bool, lens: bool = False) -> _Adapted:
    """A head of one or two layers, trained on the maps; with its lens where it has one."""
    torch.manual_seed(seed)
    dim = maps.x.shape[2]
    layers = [nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, CLASSES)]
    head = nn.Sequential(nn.BatchNorm1d(dim), *(layers if hidden else [nn.Linear(dim, CLASSES)]))
    model = _Adapted(ExitLens(dim, len(maps.masks)) if lens else None, head)

    def loss(chosen: Tensor) -> Tensor:
        logits = model(maps.x[chosen], [mask[chosen] for mask in maps.masks])
        return F.cross_entropy(logits.flatten(0, 1), maps.target[chosen].flatten())

    _train(model, loss, maps, setting, setting.lr if hidden else setting.linear_lr)
    return model


def _lens(maps: Maps, goal: Tensor | None, setting: Setting, seed: int) -> ExitLens | None:
    """A lens trained, without labels, to give the dense model's maps [B, N, C]."""
    if goal is None:
        return None
    torch.manual_seed(seed)
    model = ExitLens(maps.x.shape[2], len(maps.masks))

    def loss(chosen: Tensor) -> Tensor:
        found = model(maps.x[chosen], [mask[chosen] for mask in maps.masks])
        return F.mse_loss(found, goal[chosen])

    _train(model, loss, maps, setting, setting.lr)
    return model


def _train(
    model: nn.Module, loss: Callable[[Tensor], Tensor], maps: Maps, setting: Setting, lr: float
) -> None:
    """Minimises the loss of images by their numbers, and ends in eval mode."""
    images, patches, _ = maps.x.shape
    batch = max(setting.patches // patches, 1)
    steps = setting.epochs * (images // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    for _ in range(setting.epochs):
        for chosen in torch.randperm(images)[: images // batch * batch].split(batch):
            optimizer.zero_grad()
            loss(chosen).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def _score(model: _Adapted, maps: Maps, kept: Tensor) -> list[float]:
    """Mean IoU at all places, at those where tokens are kept [B, N], and at the others."""
    found = model(maps.x, maps.masks).argmax(dim=-1)
    return [
        mean_iou(found[there], maps.target[there]) for there in (torch.ones_like(kept), kept, ~kept)
    ]


def mean_iou(found: Tensor, target: Tensor) -> float:
    """Mean over the classes that are there of intersection over union, from 0 to 1.

    Args:
        found: int64 [n], classes that a head says.
        target: int64 [n], those that are right.
    """
    pairs = torch.bincount(target * CLASSES + found, minlength=CLASSES**2)
    table = pairs.view(CLASSES, CLASSES).double()
    both = table.diag()
    union = table.sum(0) + table.sum(1) - both
    return (both / union)[union > 0].mean().item()


def describe(summary: Mapping[str, Any]) -> str:
    """The table, from the content of dense.json alone."""
    rows = summary["rows"]
    default = next(row for row in rows if asdict(Variant()).items() <= row.items())
    table = [["map", "norm", *(HEADS[name] for name in HEADS), "difference"]]
    for row in rows:
        name = "dense model" if row["model"] == "dense" else row["fill"]
        cells = [name + ", lens" * row["lens"], row["norm"]]
        for head in HEADS:
            means = [statistics.mean(places) for places in zip(*row[head], strict=True)]
            cells.append(" ".join(f"{100 * mean:.1f}" for mean in means))
        pairs = zip(row["two_layers"], default["two_layers"], strict=True)
        cells.append(
            "default" if row is default else signed(_paired([a[0] - b[0] for a, b in pairs]))
        )
        table.append(cells)
    keep, count = summary["setting"]["recipe"]["keep"], len(summary["seeds"])
    note = ""
    if summary["quick"]:
        note = "\n\nA quick run: nothing is trained enough for the figures to mean anything."
    return f"""{format_table(table)}

three figures    mean IoU in percent of background and ten digits, patch by patch: at all places, \
at those
                 where SPOT keeps a token to the end, and at the others; mean over {count} seeds
linear head      trained on the maps of the row, as is the head of two layers
dense model's    the head of two layers trained on the dense model's maps, applied as it is
difference       to the default, of the two layers at all places, paired by seed; its standard error
norm             final norm applied to no token, to all, or to those that are kept
lens             `ExitLens`, trained with the head; for the dense model's head, to give its maps

ρ = {keep} at three stages; kept of the foreground: \
{spread(summary["foreground_kept"])}, {over_seeds(count)}{note}"""


def _paired(differences: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error."""
    count = len(differences)
    deviation = statistics.stdev(differences) if count > 1 else 0.0
    return statistics.mean(differences), deviation / count**0.5
