"""Where the time of a forward pass goes: stem, decisions, attention and MLP of each block, head."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from spot_vit.bench.runtimes import forward
from spot_vit.measure.flops import FlopCount, count_flops
from spot_vit.models.fast_blocks import SLOW
from spot_vit.utils.errors import UserError
from spot_vit.utils.modes import blocks_of
from spot_vit.utils.places import attention_name
from spot_vit.utils.timing import take_turns

Part = tuple[str, str]
"""A layer ("stem", "blocks.3", "head") and its part ("decision", "attention", "mlp" or "")."""

ROUNDS, WARMUP = 15, 3


def layer_times(
    models: Mapping[str, Any], images: Tensor, rounds: int = ROUNDS
) -> dict[str, list[dict[str, Any]]]:
    """Times the parts of models that take turns, on a CPU.

    Hooks in front of the parts note the time; what is between two of them belongs to the first.
    In a fast model they do not stand where something is fused.

    Args:
        models: by name; timm's column ViTs, converted or not, fast or not.
        images: [B, C, H, W].
        rounds: timed passes of each model.

    Returns:
        For each model its parts in order: "layer", "part", "ms" (median of a batch), "share" (of
        the medians' sum), "gmacs" (per image), "gmacs_per_s".

    Raises:
        UserError: a model has no blocks to tell apart.
    """
    size = (images.shape[1], images.shape[2], images.shape[3])
    with ExitStack() as stack:
        watches = {name: stack.enter_context(_Watch(model)) for name, model in models.items()}
        sides = {name: partial(forward, model, images) for name, model in models.items()}
        take_turns(sides, "cpu", rounds=1, warmup=WARMUP)
        for watch in watches.values():
            watch.seconds.clear()
        take_turns(sides, "cpu", rounds=rounds, warmup=0)
    found = {}
    for name, model in models.items():
        macs = _macs(count_flops(model, size))
        medians = {part: statistics.median(s) for part, s in watches[name].seconds.items()}
        whole = sum(medians.values())
        found[name] = [
            {
                "layer": part[0],
                "part": part[1],
                "ms": 1e3 * seconds,
                "share": seconds / whole,
                "gmacs": macs.get(part, 0) / 1e9,
                "gmacs_per_s": len(images) * macs.get(part, 0) / 1e9 / seconds,
            }
            for part, seconds in medians.items()
        ]
    return found


def _macs(count: FlopCount) -> dict[Part, int]:
    """Multiply-accumulates of each part."""
    found = {}
    for layer in count.layers:
        if not layer.name.startswith("blocks."):
            found[layer.name, ""] = layer.total
            continue
        found[layer.name, "decision"] = layer.predictor
        found[layer.name, "attention"] = layer.attention + layer.statistics + layer.connectivity
        found[layer.name, "mlp"] = layer.mlp + layer.other
    return found


class _Watch:
    """Notes how long each part of a model takes, pass by pass."""

    def __init__(self, model: Any) -> None:
        if not isinstance(getattr(model, "blocks", None), nn.Sequential | nn.ModuleList):
            raise UserError(f"layers: a {type(model).__name__} has no blocks to tell apart")
        self.model = model
        self.seconds: defaultdict[Part, list[float]] = defaultdict(list)
        self._pass: dict[Part, float] = {}
        self._part: Part = ("stem", "")
        self._since = 0.0

    def __enter__(self) -> _Watch:
        self._stack = ExitStack()
        self._before(self.model, self._begin)
        self._stack.callback(self.model.register_forward_hook(_watching(self._end)).remove)
        blocks = blocks_of(self.model)
        for b, block in enumerate(blocks):
            decides = getattr(block, "cuts", False) and not self.model.spot_config.cuts_inside
            name, first = f"blocks.{b}", "decision" if decides else "attention"
            self._before(block, partial(self._enter, (name, first)))
            parts = {"norm1": "attention", "norm2": "mlp"}
            if type(block) not in SLOW:
                parts |= {attention_name(block): "attention", "mlp": "mlp"}
            for child, part in parts.items():
                module = getattr(block, child, None)
                if isinstance(module, nn.Module):
                    self._before(module, partial(self._enter, (name, part)))
        leave = partial(self._enter, ("head", ""))
        self._stack.callback(blocks[-1].register_forward_hook(_watching(leave)).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _before(self, module: nn.Module, note: Any) -> None:
        self._stack.callback(module.register_forward_pre_hook(_watching(note)).remove)

    def _begin(self) -> None:
        self._pass, self._part, self._since = {}, ("stem", ""), time.perf_counter()

    def _enter(self, part: Part) -> None:
        """What comes now belongs to `part`, unless that or a later part of its block runs."""
        if part == self._part or part in self._pass:
            return
        if part[1] == "attention" and self._part == (part[0], "mlp"):
            return
        self._close()
        self._part = part

    def _close(self) -> None:
        now = time.perf_counter()
        self._pass[self._part] = self._pass.get(self._part, 0.0) + now - self._since
        self._since = now

    def _end(self) -> None:
        self._close()
        for part, seconds in self._pass.items():
            self.seconds[part].append(seconds)


def _watching(note: Any) -> Any:
    """A hook that only notes the time, which lets fast models go on as they are."""

    def hook(module: nn.Module, *_: Any) -> None:
        note()

    hook.counts_only = True  # type: ignore[attr-defined]  # see models/fast_blocks.py
    return hook
