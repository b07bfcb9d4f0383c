"""A report from its settings to its page: what `spot report` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spot_vit.config.report import ReportSettings
from spot_vit.models.convert import set_keep
from spot_vit.models.saved import class_names
from spot_vit.report.figures import write_figures
from spot_vit.report.page import render
from spot_vit.report.photos import Photos, read_digits, read_photos
from spot_vit.report.trace import Trace
from spot_vit.report.tracing import trace
from spot_vit.runs.sides import BASELINE
from spot_vit.runs.sparse import load_sparse
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write
from spot_vit.utils.folders import prepare_file

Titled = tuple[str, Trace]


def make_report(
    settings: ReportSettings,
    command: str | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> list[Path]:
    """Traces models and writes the page, and whatever else is asked for.

    Args:
        settings: what to show.
        command: that is named at the foot of the page.
        say: is told each step.

    Returns:
        The files that were written, the page first.

    Raises:
        UserError: anything that the settings name is missing or does not fit.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    for target in filter(None, (settings.output, settings.trace)):
        prepare_file(Path(target))
    accuracy = None if settings.results is None else accuracy_rows(Path(settings.results))
    if settings.data is not None:
        found = read_traces(Path(settings.data))
    else:
        found = _traced(settings, say)
    written = [Path(settings.output)]
    with atomic_write(settings.output) as temporary:
        temporary.write_text(render(found, command=command, accuracy=accuracy), encoding="utf-8")
    if settings.trace is not None:
        written += write_traces(Path(settings.trace), found)
    if settings.figures is not None:
        written += write_figures(Path(settings.figures), found, accuracy)
    return written


def _traced(settings: ReportSettings, say: Callable[[str], Any]) -> list[Titled]:
    found: list[Titled] = []
    for source in (settings.checkpoint, *(settings.compare or ())):
        assert source is not None
        model, note = load_sparse(source)
        if note:
            say(note)
        photos = _photos(model, settings)
        budgets: Sequence[float | None] = settings.keep or (None,)
        for keep in budgets:
            if keep is not None:
                set_keep(model, keep)
            say(f"{source}: {len(photos.images)} images" + ("" if keep is None else f" at {keep}"))
            one = trace(
                model,
                photos.images,
                photos.labels(class_names(model, None, model.num_classes)),
                photos.names,
                rounds=settings.rounds,
            )
            if note:
                one.notes.append(note + ".")
            found.append((_title(source, keep), one))
    return found


def _title(source: str, keep: float | None) -> str:
    name = Path(source).name or source
    return name if keep is None else f"{name}, keep {keep:g}"


def _photos(model: Any, settings: ReportSettings) -> Photos:
    if settings.images == ("digits",):
        return read_digits(model, settings.num_samples)
    return read_photos(model, settings.images or (), settings.num_samples)


# ---- several traces in files ---------------------------------------------------------------------


def write_traces(path: Path, found: Sequence[Titled]) -> list[Path]:
    """Writes traces; those behind the first get a number. A list of titles stands beside them."""
    files = []
    for k, (_, one) in enumerate(found):
        file = path if not k else path.with_name(f"{path.stem}-{k + 1}{path.suffix}")
        one.save(file)
        files.append(file)
    titles = path.with_suffix(".titles.json")
    with atomic_write(titles) as temporary:
        names = [[title, file.name] for (title, _), file in zip(found, files, strict=True)]
        temporary.write_text(json.dumps(names) + "\n")
    return [*files, titles]


def read_traces(path: Path) -> list[Titled]:
    """Reads what `write_traces` wrote, or a single trace.

    Raises:
        UserError: a file is missing or damaged.
    """
    titles = path.with_suffix(".titles.json")
    if not titles.is_file():
        one = Trace.load(path)
        return [(one.model.name, one)]
    try:
        names = [(str(title), str(file)) for title, file in json.loads(titles.read_text())]
    except (ValueError, TypeError) as error:
        raise UserError(f"{titles} is damaged: {error}") from error
    return [(title, Trace.load(path.with_name(Path(file).name))) for title, file in names]


def accuracy_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the chart of accuracy against keep, from the JSON of `spot eval`.

    Budgets of a checkpoint have one title, which is its name; the baseline has its own.

    Raises:
        UserError: there is no such file, or it is another one.
    """
    try:
        summary = json.loads(path.read_text())
        return [
            {
                "title": _series(one),
                "keep": _ratio(one["keep"]),
                "gmacs": one["gmacs"],
                "top1": 100 * float(one["top1"]),
                "error": None if one["difference"] is None else 100 * one["difference"][1],
            }
            for one in summary["rows"]
        ]
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not what spot eval writes: {error!r}") from error


def _series(row: Mapping[str, Any]) -> str:
    """What a row of an evaluation is one budget of."""
    if row["name"] == BASELINE:
        return BASELINE
    title, rate = _title(str(row["source"]), None), row["attention_keep"]
    return title if rate is None else f"{title}, attention {rate:g}"


def _ratio(keep: Any) -> float:
    """Share that each stage keeps; the mean one where each has its own."""
    if keep is None:
        return 1.0
    if isinstance(keep, list):  # cumulative shares
        return float(keep[-1]) ** (1 / len(keep))
    return float(keep)
