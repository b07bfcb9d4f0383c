"""`spot demo sparsifiner`: dense attention, Sparsifiner's, and Sparsifiner's with SPOT."""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from spot_vit.demos.large_canvas import Canvas, Phase, in_bfloat16, trained_dense
from spot_vit.demos.setup import train_once
from spot_vit.evaluation.accuracy import evaluate
from spot_vit.evaluation.statistics import paired_difference, signed
from spot_vit.measure.attention_flops import mhsa_flops
from spot_vit.measure.flops import count_flops
from spot_vit.measure.latency import compare_latency
from spot_vit.models.convert import sparsify
from spot_vit.models.recording import record_operands
from spot_vit.models.sparsifiner import (
    dense_attention,
    predictors,
    sparsify_attention,
)
from spot_vit.nn.attention_backend import choose
from spot_vit.training.connectivity_init import start_from_regions
from spot_vit.training.reconstruction import attention_seen
from spot_vit.training.sparsifiner import finetune, train_connectivity
from spot_vit.utils.files import save_json
from spot_vit.utils.machine import Clock, contention, facts, wait_for_quiet
from spot_vit.utils.tables import format_table

BATCH_SIZES = (8, 32)  # at which latency is measured
BOTH = "SPOT + Sparsifiner"


@dataclass(frozen=True)
class Setting:
    """What is trained and how, found by trial (our choice).

    Attributes:
        canvas: the dense model.
        keep_rate: keys per query.
        connectivity: other fields of `SparsifinerConfig`. The published rank, n // 6, and threshold
            were made for 197 tokens: with 577 an attention weight is a third of what it was. A
            threshold that leaves fewer columns than the budget makes ties, which cost time.
        share: GMACs of SPOT with Sparsifiner as a share of the dense model's.
        at: blocks before which tokens go.
        batch_size: of the sparse stages.
        connectivity_steps: of the first stage.
        connectivity_lr: its peak rate.
        steps: of the second stage, of Sparsifiner alone.
        both_steps: the same with SPOT, whose predictors start from nothing.
        lr: its peak rate.
        relevance_lr: of SPOT's predictors.
        weight_decay: of all stages.
        test_images: of digits never trained on.
        latency_rounds: timed passes of each model.
    """

    canvas: Canvas = dataclasses.field(default_factory=Canvas)
    keep_rate: float = 0.25
    connectivity: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"reduce_n": 16, "basis_threshold": 1e-4}
    )
    share: float = 0.5
    at: Sequence[int] = (1, 2, 3)
    batch_size: int = 16
    connectivity_steps: int = 40
    connectivity_lr: float = 3e-5
    steps: int = 30
    both_steps: int = 70
    lr: float = 1e-4
    relevance_lr: float = 1e-3
    weight_decay: float = 0.05
    test_images: int = 1440
    latency_rounds: int = 30


QUICK = Setting(
    Canvas(
        width=64,
        depth=4,
        heads=1,
        batch_size=4,
        phases=(Phase(32, 2, 2, 1e-3), Phase(64, 4, 2, 1e-3)),
    ),
    batch_size=4,
    connectivity_steps=2,
    connectivity={"reduce_n": 6},
    share=0.75,
    steps=2,
    both_steps=2,
    test_images=60,
    latency_rounds=3,
)


def run(output: Path, *, quick: bool = False, seed: int = 0, threads: int = 2) -> dict[str, Any]:
    """Trains, measures, prints the table, and writes sparsifiner.json.

    Trained models are kept in `output`: a second run only measures.

    Args:
        output: folder for the files, made when it is not there.
        quick: a run of seconds that only shows that everything works.
        seed: of initialisation, training images and decisions; the test images stay the same.
        threads: CPU threads that torch may use.

    Returns:
        The content of sparsifiner.json.
    """
    started = time.perf_counter()
    torch.set_num_threads(threads)
    setting = QUICK if quick else Setting()
    models = trained(output, setting, seed)
    summary: dict[str, Any] = {
        "setting": dataclasses.asdict(setting),
        "seed": seed,
        "quick": quick,
        "threads": threads,
        "machine": facts(),
        **measured(models, setting),
        "seconds": time.perf_counter() - started,
    }
    path = output / "sparsifiner.json"
    save_json(path, summary)
    print(f"\n{describe(summary)}\n\n{summary['seconds'] / 60:.1f} minutes; written: {path}")
    return summary


# ---- training ------------------------------------------------------------------------------------


def trained(output: Path, setting: Setting, seed: int) -> dict[str, Any]:
    """The three models, trained or read from `output`."""
    dense: Any = trained_dense(output, setting.canvas, seed)
    torch.manual_seed(seed)
    connected = sparse_model(dense, setting)
    path = output / f"connectivity-seed{seed}.safetensors"
    train_once(
        path,
        connected,
        _config(setting, seed, "connectivity"),
        _connecting(connected, setting, path, seed),
    )
    alone = copy.deepcopy(connected)
    both = with_tokens_removed(copy.deepcopy(connected), dense, setting)
    for model, steps in ((alone, "steps"), (both, "both_steps")):
        torch.manual_seed(seed)
        path = output / f"{'sparsifiner' if model is alone else 'both'}-seed{seed}.safetensors"
        tune = _tuning(model, dense, setting, getattr(setting, steps), path, seed)
        train_once(path, model, _config(setting, seed, steps), tune)
    models = {"dense": dense, "Sparsifiner": alone, BOTH: both}
    return {name: model.eval() for name, model in models.items()}


def _connecting(model: Any, setting: Setting, path: Path, seed: int) -> Callable[[], Any]:
    """A call that trains the predictors: the first stage."""
    steps = setting.connectivity_steps
    return partial(
        train_connectivity,
        model,
        _images(setting, steps, 100 * seed + 50),
        lr=setting.connectivity_lr,
        weight_decay=setting.weight_decay,
        wrap=in_bfloat16,
        warmup=steps // 10,
        clip_grad=1.0,
        name=path.stem,
    )


def _tuning(
    model: Any, dense: Any, setting: Setting, steps: int, path: Path, seed: int
) -> Callable[[], Any]:
    """A call that fine-tunes the model: the second stage."""
    return partial(
        finetune,
        model,
        _images(setting, steps, 100 * seed + 60),
        copy.deepcopy(dense),
        lr=setting.lr,
        relevance_lr=setting.relevance_lr,
        weight_decay=setting.weight_decay,
        wrap=in_bfloat16,
        warmup=steps // 10,
        clip_grad=1.0,
        name=path.stem,
    )


def sparse_model(dense: Any, setting: Setting) -> Any:
    """A copy of the dense model with Sparsifiner attention, its predictors new."""
    model = copy.deepcopy(dense)
    sparsify_attention(model, setting.keep_rate, **setting.connectivity)
    return start_from_regions(model)


def with_tokens_removed(model: Any, dense: Any, setting: Setting) -> Any:
    """The model made a SPOT ViT too, with the largest ρ that meets the share of GMACs."""
    size = setting.canvas.input_size
    gmacs = setting.share * count_flops(dense, size).total / 1e9
    return sparsify(
        model,
        keep={"gmacs": gmacs, "input_size": size},
        at=list(setting.at),
        train_decision="topk",
    )


_UNSEEN = {  # by each training: what it does not depend on
    "connectivity": {"share", "at", "steps", "both_steps", "lr", "relevance_lr"},
    "steps": {"share", "at", "both_steps", "relevance_lr"},
    "both_steps": {"steps"},
}


def _config(setting: Setting, seed: int, training: str) -> dict[str, Any]:
    """What a trained model depends on."""
    unseen = _UNSEEN[training] | {"test_images", "latency_rounds"}
    fields = dataclasses.asdict(setting)
    return {"setting": {k: fields[k] for k in fields if k not in unseen}, "seed": seed}


def _images(setting: Setting, steps: int, seed: int) -> DataLoader[Any]:
    data = setting.canvas.digits("train", steps * setting.batch_size, seed=seed)
    return DataLoader(data, batch_size=setting.batch_size)


# ---- measuring -----------------------------------------------------------------------------------


def measured(models: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Accuracy, cost and time of every model; the first is the baseline."""
    size, canvas = setting.canvas.input_size, setting.canvas
    test = canvas.digits("test", setting.test_images)
    loader, sources = DataLoader(test, batch_size=60), test.sources(range(len(test)))
    for model in models.values():  # crossover is measured before anything is timed
        model(test.batch([0]).image)
    threads, cpus = torch.get_num_threads(), os.cpu_count() or 1
    wait_for_quiet(10)
    start = Clock.now()
    latency = {
        batch: compare_latency(
            models,
            test.batch(range(batch)).image,
            rounds=setting.latency_rounds,
            name=f"latency at batch {batch}",
        )
        for batch in BATCH_SIZES
    }
    busy = contention(Clock.now().since(start), threads, cpus)
    results = {name: evaluate(model, loader, f"test {name}") for name, model in models.items()}
    baseline = next(iter(results.values())).correct
    rows = []
    for name, model in models.items():
        row: dict[str, Any] = {
            "model": name,
            "top1": results[name].top1,
            "difference": paired_difference(results[name].correct, baseline, sources),
            "gmacs": count_flops(model, size).total / 1e9,
            "mhsa_mmacs": mhsa_flops(model, size).total / 1e6,
            "keep": model.spot_config.keep if hasattr(model, "spot_config") else None,
        }
        for batch, times in latency.items():
            row[f"latency_batch{batch}"] = dataclasses.asdict(times[name])
        rows.append(row)
    tokens = 1 + (canvas.size // 8) ** 2
    sparse = models["Sparsifiner"]
    with torch.no_grad(), dense_attention(sparse), record_operands(sparse) as operands:
        sparse(test.batch(range(BATCH_SIZES[-1])).image)
    seen = attention_seen(predictors(sparse), operands).values()
    return {
        "attention_seen": [statistics.mean(share) for share in zip(*seen, strict=True)],
        "tokens": tokens,
        "backend": choose(tokens, setting.keep_rate, torch.float32, torch.device("cpu")),
        "contended": busy,
        "rows": rows,
    }


def describe(summary: Mapping[str, Any]) -> str:
    """The table and how to read it, from the content of sparsifiner.json alone."""
    rows = summary["rows"]
    table = [["", "top-1", "against dense", "GMACs/image", "MHSA MMACs", "ρ"]]
    table[0] += [f"ms, batch {batch}" for batch in BATCH_SIZES]
    for row in rows:
        cells = [row["model"], f"{row['top1']:.2%}"]
        cells.append("" if row is rows[0] else signed(row["difference"]))
        cells.append(f"{row['gmacs']:.3f} {row['gmacs'] / rows[0]['gmacs']:4.0%}")
        cells.append(f"{row['mhsa_mmacs']:.1f} {row['mhsa_mmacs'] / rows[0]['mhsa_mmacs']:4.0%}")
        cells.append("" if row["keep"] is None else f"{row['keep']:.3f}")
        for batch in BATCH_SIZES:
            times = row[f"latency_batch{batch}"]
            cells.append(f"{times['median']:.1f} x{times['ratio']:.2f}")
        table.append(cells)
    setting, notes = summary["setting"], ""
    seen, best = summary["attention_seen"]
    if summary["contended"]:
        notes += f"\n\nThe machine was busy, so times mean little: {summary['contended']}."
    if summary["quick"]:
        notes += "\n\nA quick run: nothing is trained enough for the figures to mean anything."
    return f"""{format_table(table)}

top-1          accuracy on {setting["test_images"]} images of digits never trained on, one seed
against dense  paired difference on the same images and its standard error, points
GMACs/image    multiply-accumulates of everything, stem, predictors and statistics included
MHSA MMACs     those of q k^T, A v and the connectivity predictors alone, 1e6
ρ              share of the patches that each of {len(setting["at"])} stages keeps
ms             median time of a batch (CPU threads: {summary["threads"]}), ratio to dense

{summary["tokens"]} tokens, {setting["keep_rate"]:.0%} of the keys per query. Sparsifiner's hold \
{seen:.0%} of its own dense attention; the best would hold {best:.0%}.
backend="auto" chose {summary["backend"]} attention.{notes}"""
