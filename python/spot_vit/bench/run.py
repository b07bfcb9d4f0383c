"""A benchmark from its settings to its figures: what `spot bench MODEL` does."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from spot_vit.bench.layers import layer_times
from spot_vit.bench.lines import BASELINE, Line, first_line, lines
from spot_vit.bench.picture import save_picture
from spot_vit.bench.runtimes import absent
from spot_vit.bench.timed import in_quiet, timed
from spot_vit.bench.variants import Variant, variants
from spot_vit.config.bench import RUNTIMES, BenchSettings
from spot_vit.config.fields import listed
from spot_vit.measure.peak import Peak, measured_peak
from spot_vit.models.fast import fast
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import save_json
from spot_vit.utils.folders import prepare_file
from spot_vit.utils.machine import facts
from spot_vit.utils.timing import Times, summary


def bench(settings: BenchSettings, say: Callable[[str], Any] = lambda text: None) -> dict[str, Any]:
    """Times a model in every runtime that is there, dense beside sparse, all in turns.

    Writes the JSON file that the settings name, and a picture beside it where matplotlib is there.

    Args:
        settings: which model, in what, how.
        say: is told each step.

    Returns:
        What the JSON file holds; docs/bench.md describes it.

    Raises:
        UserError: anything named in the settings is missing or does not fit.
    """
    began = time.perf_counter()
    missing, chosen = _checked(settings)
    models = variants(settings)
    dtype = getattr(torch, settings.dtype)
    say("measuring the machine's peak")
    peak = measured_peak(dtype, settings.device)
    batches, layers = [], []
    with TemporaryDirectory(prefix="spot-bench-") as folder:
        prepared = lines(models, settings, chosen, Path(folder), missing, say)
        for batch in settings.batch_size:
            images = torch.randn(batch, *models[0].size, device=settings.device, dtype=dtype)
            batches.append(_batch(prepared, images, settings, peak, missing, say))
            if settings.layers:
                say(f"layers, batch {batch}")
                layers.append(_layers(models[1], images, "fast" in chosen, settings.patience))
    result: dict[str, Any] = {
        "settings": settings.to_dict(),
        "machine": facts(settings.device),
        "model": {
            "name": settings.model,
            "image": list(models[0].size),
            "parameters": sum(p.numel() for p in models[0].model.parameters()),
        },
        "peak": {"gmacs_per_s": peak.gmacs_per_s, "by": peak.by, "size": peak.size},
        "absent": missing,
        "batches": batches,
        "layers": layers,
    }
    picture = save_picture(result, settings.picture)
    result |= {
        "picture": None if picture is None else str(picture),
        "seconds": time.perf_counter() - began,
    }
    save_json(settings.output, result)
    return result


def contended(result: dict[str, Any]) -> bool:
    """Whether the machine was too busy for ratios at any time."""
    return any(batch["contended"] for batch in (*result["batches"], *result["layers"]))


def _checked(settings: BenchSettings) -> tuple[dict[str, str], list[str]]:
    """Runtimes that are not there, with reasons, and those to use; threads are set."""
    prepare_file(settings.output)
    if settings.device not in ("cpu", "cuda"):
        raise UserError(f"device: expected cpu or cuda, got {settings.device!r}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: torch sees no GPU here (`spot info` tells more)")
    if settings.layers and settings.device != "cpu":
        raise UserError("layers: they are told apart on a CPU alone; leave out --layers")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    missing = absent(settings)
    if refused := [name for name in settings.runtimes or () if name in missing]:
        raise UserError(f"runtimes: {refused[0]} cannot be used here: {missing[refused[0]]}")
    return missing, [name for name in settings.runtimes or RUNTIMES if name not in missing]


def _batch(
    prepared: Sequence[Line],
    images: Tensor,
    settings: BenchSettings,
    peak: Peak,
    missing: dict[str, str],
    say: Callable[[str], Any],
) -> dict[str, Any]:
    """Times one batch size."""
    sides, started = {}, []
    for line in prepared:
        say(f"starting {line.name}, batch {len(images)}")
        try:
            sides[line.name] = line.start(images)
        except Exception as error:  # of any runtime, such as one without an operator
            if line.name == BASELINE:
                raise
            missing[f"{line.name}, batch {len(images)}"] = first_line(error)
            continue
        started.append(line)
    found = timed(
        sides,
        settings.device,
        seconds=settings.seconds,
        patience=settings.patience,
        name=f"batch {len(images)}",
    )
    dense = found.times[BASELINE].median_ms
    stated = found.contended is None
    return {
        "batch": len(images),
        "contended": found.contended,
        "attempts": found.attempts,
        "rows": [
            _row(line, found.times[line.name], images, dense, peak, stated) for line in started
        ],
    }


def _row(
    line: Line, times: Times, images: Tensor, dense: float, peak: Peak, stated: bool
) -> dict[str, Any]:
    """The figures of one line; those that compare are None unless they are to be stated."""
    figures = summary(times.wall)
    seconds = figures["median_ms"] / 1e3
    rate = len(images) * line.gmacs / seconds
    compiles = images.device.type in line.kind.compiles
    return {
        "name": line.name,
        "runtime": line.runtime,
        "peer": line.peer,
        "keep": listed(line.variant.keep),
        "attention_keep": line.variant.attention_keep,
        "gmacs": line.gmacs,
        "tokens": line.tokens,
        **figures,
        "images_per_s": len(images) / seconds,
        "speedup": dense / figures["median_ms"] if stated else None,
        "gmacs_per_s": rate,
        "share_of_peak": rate / peak.gmacs_per_s if stated else None,
        "memory_bytes": line.memory,
        "graphs": line.graphs if compiles else None,
        "recompilations": line.recompilations if compiles else None,
    }


def _layers(variant: Variant, images: Tensor, with_fast: bool, patience: float) -> dict[str, Any]:
    """Where the time of a model goes, in eager mode and fast."""
    models = {"eager": variant.copied()}
    if with_fast:
        models["fast"] = fast(variant.copied(), images.dtype)
    found, reason, attempts = in_quiet(partial(layer_times, models, images), "cpu", patience)
    if reason is not None:
        for part in itertools.chain(*found.values()):
            part["share"] = None
    return {
        "batch": len(images),
        "contended": reason,
        "attempts": attempts,
        "model": variant.label,
        "runtimes": found,
    }
