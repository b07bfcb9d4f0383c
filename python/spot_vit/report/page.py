"""`render`: traces as one HTML text that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from spot_vit.config.report import MODELS
from spot_vit.report import charts, views
from spot_vit.report.encode import picture_uri, script_json
from spot_vit.report.life import image_data, models_data
from spot_vit.report.record import TraceData
from spot_vit.report.stages import stage_colours, stage_title
from spot_vit.report.views import Titled


def render(
    traces: Sequence[tuple[str, TraceData]],
    *,
    command: str | None = None,
    accuracy: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """A page about what models did with the same images: one HTML text that loads nothing.

    Several traces are shown as budgets of one model, behind a slider, where their dense logits
    agree; side by side otherwise.

    Args:
        traces: one to four, each with its title, of the same images in the same order.
        command: that made the page, for its footer.
        accuracy: rows for a chart of accuracy against keep: "title", "keep" and "top1" (percent)
            of each, and "gmacs" and "error" (percent) if known.

    Raises:
        ValueError: none or too many traces, or traces of different images.
    """
    traces = list(traces)
    _check(traces)
    mode = views.mode(traces)
    script = Markup(_part("page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = views.cards(traces)
    text = _environment().get_template("page").render(
        mode=mode,
        style=Markup(_part("page.css")),
        script=script,
        digest=digest,
        summaries=[views.summary(title, trace) for title, trace in traces],
        notes=list(dict.fromkeys(note for _, trace in traces for note in trace.notes)),
        model=traces[0][1].model.name,
        groups=[
            (name + (views.SOME[mode] if group != "same" else ""),
             [card for card in found if card.group == group])
            for group, name in views.GROUPS.items()
        ],
        labelled=any(card.label is not None for card in found),
        changed=any(card.group != "same" for card in found),
        colours=_legend(traces),
        fuses=any(
            stage.weight is not None
            for _, trace in traces for image in trace.images for stage in image.stages
        ),
        data=script_json(models_data(traces, mode)),
        life={card.number: _life(card.number, traces) for card in found},
        sets=[_set(title, trace) for title, trace in traces],
        accuracy=charts.svg(charts.accuracy_chart(accuracy)) if accuracy else None,
        accuracy_rows=accuracy or [],
        accuracy_titles=charts.titles_of(accuracy or []),
        facts=views.fact_rows(traces[0][1].facts),
        configs=[(title, views.config_rows(trace.model)) for title, trace in traces],
        command=command,
    )  # fmt: skip
    return text.encode("utf-8", "replace").decode("utf-8")  # halves of surrogate pairs


def _check(traces: list[Titled]) -> None:
    if not 1 <= len(traces) <= MODELS:
        raise ValueError(f"traces: expected 1 to {MODELS}, got {len(traces)}")
    first = [image.name for image in traces[0][1].images]
    for title, trace in traces[1:]:
        if (names := [image.name for image in trace.images]) != first:
            raise ValueError(
                f"traces: expected the same images in the same order, but {traces[0][0]!r} has "
                f"{len(first)} and {title!r} has {len(names)}, or other names: trace them together"
            )


def _part(name: str) -> str:
    folder = resources.files("spot_vit") / "report" / "template"
    return (folder / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        loader=DictLoader({"page": _part("page.html.j2")}),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["picture"] = picture_uri
    return environment


def _life(number: int, traces: list[Titled]) -> Markup:
    return script_json([image_data(trace.images[number]) for _, trace in traces])


def _legend(traces: list[Titled]) -> list[tuple[str, str]]:
    """Names and colours of stages, where all models have the same."""
    kinds = {
        tuple(stage_title(stage) for stage in trace.images[0].stages)
        for _, trace in traces
        if trace.images
    }
    if len(kinds) != 1:
        return []
    titles = kinds.pop()
    return list(zip(titles, stage_colours(len(titles)), strict=True))


def _set(title: str, trace: TraceData) -> dict[str, Any]:
    """Charts of all images of a trace."""
    model = trace.model
    rows = [
        (sparse.name, sparse.tokens, dense.gmacs, sparse.gmacs, dense.ms, sparse.ms)
        for sparse, dense in zip(model.layers, model.dense_layers, strict=True)
    ]
    found: dict[str, list[tuple[str, Markup]]] = {"keep": [], "layers": [], "scores": []}
    for one in charts.set_charts(trace):
        found[one.group].append((one.caption, charts.svg(one.chart)))
    return {
        "title": title,
        "maps": found["keep"],
        "layers": found["layers"],
        "rows": rows,
        "scores": found["scores"],
    }
