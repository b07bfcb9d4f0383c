"""The rows of a benchmark: every model in every runtime, and peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._dynamo.utils import counters

from spot_vit.bench.peers import PEERS
from spot_vit.bench.runtimes import TABLE, Open, Runtime, forward
from spot_vit.bench.variants import Variant, cost, shared_copy
from spot_vit.config.bench import BenchSettings
from spot_vit.measure.memory import peak_growth

BASELINE = "eager, dense"


@dataclass
class Line:
    """A model in a runtime.

    Attributes:
        name: of both.
        runtime: of `RUNTIMES`.
        variant: the model.
        peer: name and setting of another package's method, or None.
        open: gives what maps images to logits.
        kind: the runtime's row.
        gmacs: billions of multiply-accumulates per image.
        tokens: that attend in a block, on average; None where there are no blocks.
        memory: bytes that a call takes at most, at the present batch size.
        graphs: that the present batch size compiled in its first call.
        recompilations: graphs that it compiled later.
    """

    name: str
    runtime: str
    variant: Variant
    peer: str | None
    open: Open
    kind: Runtime
    gmacs: float
    tokens: float | None
    memory: int | None = None
    graphs: int = 0
    recompilations: int = 0

    def start(self, images: Tensor) -> Callable[[int], Any]:
        """Opens the model for a batch, measures a call's memory, and gives what is to be timed."""
        model = self.open()
        self.graphs = self.recompilations = 0

        def call(i: int) -> Any:
            before = _graphs()
            found = forward(model, images)
            self.recompilations += _graphs() - before
            return found

        if not self.kind.keeps_memory:
            call(0)  # does what is done once
            self.graphs, self.recompilations = self.recompilations, 0
        self.memory = peak_growth(lambda: call(0), images.device)
        return call


def _graphs() -> int:
    """How many graphs torch has compiled in this process."""
    return counters["stats"]["unique_graphs"]


def lines(
    models: Sequence[Variant],
    settings: BenchSettings,
    runtimes: Sequence[str],
    folder: Path,
    absent: dict[str, str],
    say: Callable[[str], Any],
) -> list[Line]:
    """Prepares every model in every runtime; dense in eager mode comes first, always.

    Args:
        models: the dense one first.
        settings: of the benchmark.
        runtimes: which to prepare.
        folder: an empty one, for files.
        absent: is told what could not be prepared, and why.
        say: is told each step.
    """
    order = ["eager", *(name for name in runtimes if name != "eager")]
    found: list[Line] = []
    for name in order:
        for number, variant in enumerate(models):
            if name == "eager" and number and name not in runtimes:
                continue
            label = f"{name}, {variant.label}"
            say(f"preparing {label}")
            place = folder / f"{name}-{number}"
            place.mkdir(parents=True)

            def prepare(variant: Variant = variant, name: str = name, place: Path = place) -> Line:
                opened = TABLE[name].make(variant, settings, place)
                model = opened() if name == "fast" else variant.model
                count, tokens = cost(model, variant.size)
                kind, total = TABLE[name], count.total / 1e9
                return Line("", name, variant, None, opened, kind, total, tokens)

            _add(found, label, prepare, absent)
    if "eager" in runtimes and not settings.no_peers:
        _add_peers(found, models, absent, say)
    return found


def _add_peers(
    found: list[Line],
    models: Sequence[Variant],
    absent: dict[str, str],
    say: Callable[[str], Any],
) -> None:
    """Peers at about the cost of each model that removes tokens."""
    for peer in PEERS:
        for variant in models:
            if variant.keep is None or not peer.installed:
                continue
            label = f"{peer.package}, as {variant.label}"
            say(f"preparing {label}")

            def prepare(peer: Any = peer, variant: Variant = variant) -> Line:
                model = shared_copy(models[0].model)
                macs = cost(variant.model, variant.size)[0].total
                words = peer.apply(model, macs, variant.size)
                count, tokens = cost(model, variant.size)
                kind, total = TABLE["eager"], count.total / 1e9
                return Line("", "eager", variant, words, lambda: model, kind, total, tokens)

            _add(found, label, prepare, absent)


def _add(found: list[Line], name: str, prepare: Callable[[], Line], absent: dict[str, str]) -> None:
    """Adds a line; one that cannot be had is no reason to do without the others."""
    try:
        line = prepare()
    except Exception as error:  # of any runtime
        if name == BASELINE:
            raise
        absent[name] = first_line(error)
        return
    line.name = name if line.peer is None else line.peer
    if all(line.name != other.name for other in found):  # a peer may fit two budgets best
        found.append(line)


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
