"""What the page says of each image and model: words and numbers for its template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spot_vit.config.methods import METHODS
from spot_vit.report.encode import squares_path
from spot_vit.report.record import Array, ImageTrace, LayerCost, ModelTrace, StageTrace, TraceData
from spot_vit.report.stages import stage_colours, stage_title

Titled = tuple[str, TraceData]

GROUPS = {
    "lost": "Dense right, sparse wrong",
    "won": "Dense wrong, sparse right",
    "changed": "Answers that changed",
    "same": "Same answer",
}
"""Of images, in the page's order."""

SOME = {"one": "", "budgets": ", at some budget", "models": ", in some model"}
"""What a group's name goes on with, by `mode`, where something changed."""


@dataclasses.dataclass
class Answer:
    """What a pass answered.

    Attributes:
        index: of the class.
        name: of the class.
        percent: its probability.
        right: whether it is the label; None without one.
    """

    index: int
    name: str
    percent: str
    right: bool | None


@dataclasses.dataclass
class Tile:
    """One picture of a card's strip: the input, or what a stage left of it.

    Attributes:
        title: of the stage.
        count: how many patches are left.
        left: path of the patches that have left, and colour, by stage so far.
        fused: circles x, y, radius of those that this stage fused.
        note: what became of tokens that are no patches, or "".
    """

    title: str
    count: str
    left: list[tuple[str, str]]
    fused: list[tuple[float, float, float]]
    note: str


@dataclasses.dataclass
class Side:
    """What one model did with the image of a card; `picture` is its number among the card's."""

    dense: Answer
    sparse: Answer
    tiles: list[Tile]
    picture: int
    rows: int
    columns: int

    @property
    def changed(self) -> bool:
        """Whether the answer is another one than the dense model's."""
        return self.dense.index != self.sparse.index

    @property
    def wrong(self) -> bool:
        """Whether a sparse answer is not the label."""
        return self.sparse.right is False


@dataclasses.dataclass
class Card:
    """One image; `number` is its place in the traces."""

    number: int
    name: str
    label: str | None
    group: str
    pictures: list[Array]
    sides: list[Side]


def class_name(model: ModelTrace, index: int) -> str:
    """Name of a class, or its number where it has none."""
    names = model.classes
    return names[index] if names is not None and index < len(names) else f"class {index}"


def cards(traces: Sequence[Titled]) -> list[Card]:
    """The images of all traces, in the page's order."""
    made = [_card(i, traces) for i in range(len(traces[0][1].images))]
    order = list(GROUPS)
    return sorted(made, key=lambda card: order.index(card.group))


def _card(i: int, traces: Sequence[Titled]) -> Card:
    pictures: list[Array] = []
    sides = []
    for _, trace in traces:
        image = trace.images[i]
        same = [k for k, other in enumerate(pictures) if np.array_equal(other, image.picture)]
        if not same:
            pictures.append(image.picture)
        sides.append(_side(trace.model, image, same[0] if same else len(pictures) - 1))
    first, model = traces[0][1].images[i], traces[0][1].model
    label = None if first.label is None else class_name(model, first.label)
    return Card(i, first.name, label, _group(sides), pictures, sides)


def _group(sides: Sequence[Side]) -> str:
    if any(side.dense.right and side.sparse.right is False for side in sides):
        return "lost"
    if any(side.dense.right is False and side.sparse.right for side in sides):
        return "won"
    return "changed" if any(side.changed for side in sides) else "same"


def _side(model: ModelTrace, image: ImageTrace, picture: int) -> Side:
    dense, sparse = (
        answer(model, logits, image.label) for logits in (image.dense_logits, image.logits)
    )
    rows, columns = model.grid
    return Side(dense, sparse, _tiles(model, image), picture, rows, columns)


def answer(model: ModelTrace, logits: Array, label: int | None = None) -> Answer:
    """What logits [classes] say; right or wrong where there is a label."""
    shares = np.exp(logits.astype(np.float64) - logits.max())
    index = int(logits.argmax())
    percent = f"{100 * shares[index] / shares.sum():.0f} %"
    right = None if label is None else index == label
    return Answer(index, class_name(model, index), percent, right)


def _tiles(model: ModelTrace, image: ImageTrace) -> list[Tile]:
    rows, columns = model.grid
    total = rows * columns
    tiles = [Tile("input", f"{total} patches", [], [], "")]
    left: list[tuple[str, str]] = []
    for stage, colour in zip(image.stages, stage_colours(len(image.stages)), strict=True):
        patch = stage.position < total
        gone = stage.position[~stage.kept & patch]
        mask = np.zeros(total, bool)
        mask[gone] = True
        left = [*left, (squares_path(mask.reshape(rows, columns)), colour)]
        stay = int((stage.kept & patch).sum())
        note = _fused_note(int((~patch).sum()), int((stage.kept & ~patch).sum()))
        count = f"{stay} of {total} stay"
        tiles.append(Tile(stage_title(stage), count, left, _fused(stage, total, columns), note))
    return tiles


def _fused(stage: StageTrace, total: int, columns: int) -> list[tuple[float, float, float]]:
    """Circles on the patches that a stage fused; their areas are their weights."""
    if stage.weight is None:
        return []
    gone = ~stage.kept & (stage.position < total)
    weight = stage.weight[gone]
    largest = max(float(weight.max(initial=0.0)), 1e-12)
    return [
        (at % columns + 0.5, at // columns + 0.5, round(0.08 + 0.2 * (w / largest) ** 0.5, 3))
        for at, w in zip(stage.position[gone].tolist(), weight.tolist(), strict=True)
    ]


def _fused_note(came: int, stayed: int) -> str:
    if not came:
        return ""
    return "fused token stays" if stayed == came else f"{stayed} of {came} fused tokens stay"


# ---- the models ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Summary:
    """A model in a few figures, each with its name: `figures` are (name, value, remark)."""

    title: str
    about: str
    figures: list[tuple[str, str, str]]


def summary(title: str, trace: TraceData) -> Summary:
    """What a trace says of its model as a whole."""
    model, figures = trace.model, []
    for name, unit, digits in (("gmacs", "GMACs", 2), ("ms", "ms", 1)):
        sparse, dense = total(model.layers, name), total(model.dense_layers, name)
        if sparse is not None and dense:
            remark = f"of {dense:.{digits}f}, {100 * sparse / dense:.0f} %"
            figures.append((f"{unit} per image", f"{sparse:.{digits}f}", remark))
    answers = [_side(model, image, 0) for image in trace.images]
    labelled = [side for side in answers if side.sparse.right is not None]
    if labelled:
        right = sum(bool(side.sparse.right) for side in labelled)
        dense_right = sum(bool(side.dense.right) for side in labelled)
        figures.append(("right answers", f"{right}", f"of {len(labelled)}, dense {dense_right}"))
    changed = sum(side.changed for side in answers)
    figures.append(("answers changed", f"{changed}", f"of {len(answers)}"))
    return Summary(title, about(model), figures)


def about(model: ModelTrace) -> str:
    """A model's method and budget in a sentence."""
    methods = []
    for name, config in model.conversions.items():
        method = config.get("method", name) if isinstance(config, Mapping) else name
        methods.append(METHODS[method].label if method in METHODS else str(method).capitalize())
    rows, columns = model.grid
    text = " and ".join(methods)
    if not model.keep:
        return f"{text}, {rows} × {columns} patches, none leaves"
    keep = ", ".join(f"{100 * ratio:.0f}" for ratio in model.keep)
    return f"{text}, {rows} × {columns} patches, of which {keep} % stay"


def total(layers: Sequence[LayerCost], name: str) -> float | None:
    """Sum of a cost over layers; None where it was not measured."""
    values = [getattr(layer, name) for layer in layers]
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def mode(traces: Sequence[Titled]) -> str:
    """How several traces are shown: "one", "budgets" of one model, or different "models".

    Budgets of one model are told by its dense logits, which no budget changes.
    """
    if len(traces) == 1:
        return "one"
    first = traces[0][1].images
    same = all(
        a.dense_logits.shape == b.dense_logits.shape
        and np.allclose(a.dense_logits, b.dense_logits, atol=1e-4)
        for _, trace in traces[1:]
        for a, b in zip(first, trace.images, strict=True)
    )
    return "budgets" if same and first else "models"


def config_rows(model: ModelTrace) -> list[tuple[str, str]]:
    """Every setting of a model's conversions, by its full name."""
    rows = [("architecture", model.name), ("prefix tokens", ", ".join(model.prefix) or "none")]
    for name, config in model.conversions.items():
        if not isinstance(config, Mapping):
            rows.append((name, str(config)))
            continue
        rows += [(f"{name}.{key}", str(value)) for key, value in config.items()]
    return rows


def fact_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Facts as text; empty ones are left out."""
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]
