"""`trace`: one pass of a sparse model over some images, with everything that happened in it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spot_vit.config.conversion import conversion_of
from spot_vit.evaluation.drawing import shown
from spot_vit.models.fast import is_fast
from spot_vit.models.recording import watched
from spot_vit.models.saved import class_names
from spot_vit.models.sparsifiner import dense_attention
from spot_vit.models.token_pass import TokenPass
from spot_vit.nn.operands import Attended, logits_of, map_from
from spot_vit.report.costs import layer_costs
from spot_vit.report.effects import Scoring, evidence_effects, watch_scorers
from spot_vit.report.record import BlockTrace, ImageTrace, ModelTrace, StageTrace
from spot_vit.report.trace import Trace
from spot_vit.utils.machine import facts
from spot_vit.utils.modes import blocks_of, eval_mode, unwrap
from spot_vit.utils.places import prefix_of

CHUNK = 16  # images at a time: their maps are in memory together


def trace(
    model: Any,
    images: Tensor,
    labels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    *,
    attention: Sequence[int] | str = "stages",
    rounds: int = 0,
) -> Trace:
    """What a sparse model does with images: which patches leave it, when, and why.

    The model decides as it does when it is called, and its logits have the same bits; everything
    else is found beside the pass, or by asking its parts again. It is in eval mode meanwhile, and
    its weights, mode and random state are as before afterwards.

    Args:
        model: converted by `sparsify`, `sparsify_attention`, or both; fast or not. A compiled one
            is traced eagerly, as the trace notes.
        images: float [B, C, H, W], as the model takes them, on its device.
        labels: index of each image's class, if known.
        names: of the images; numbers by default.
        attention: blocks whose attention maps are kept, by index; "stages" for the last that sees
            what each decision removes, and the last of all; "all".
        rounds: passes of one image by which layers are timed, dense and sparse; 0 for none.

    Raises:
        TypeError: the model is not converted.
        ValueError: other than B labels or names, or an index of a block that there is not.
    """
    inside = unwrap(model)
    conversion = conversion_of(inside)
    if not conversion:
        raise TypeError(f"trace needs a converted model, and this {type(inside).__name__} is dense")
    for what, given in (("labels", labels), ("names", names)):
        if given is not None and len(given) != len(images):
            raise ValueError(
                f"{what}: expected one for each of {len(images)} images, got {len(given)}"
            )
    wanted = _blocks_with_maps(inside, attention)
    notes = []
    if hasattr(model, "_orig_mod") or getattr(inside, "_compiled_call_impl", None) is not None:
        notes.append("The model is compiled; it was traced in eager mode.")
    found: list[ImageTrace] = []
    with torch.no_grad(), eval_mode(inside):
        for first in range(0, len(images), CHUNK):
            part = images[first : first + CHUNK]
            for i, one in enumerate(_Chunk(inside, part, wanted).images()):
                at = first + i
                one.name = str(at) if names is None else str(names[at])
                one.label = None if labels is None else int(labels[at])
                found.append(one)
        about = _about(inside, images, rounds)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Trace(about, found, {"date": now, **facts(images.device)}, notes)


class _Chunk:
    """The passes over a few images."""

    def __init__(self, model: Any, images: Tensor, wanted: Sequence[int]) -> None:
        self.model, self.pictures = model, images
        self.sparsified = hasattr(model, "spot_config")
        self.kept: list[Tensor] | None = None
        self.undecided: tuple[int, Any] | None = (
            None  # first block that decides, and the state there
        )
        self.stages: list[dict[str, Any]] = []
        self.statistics: dict[int, dict[str, Any]] = {}
        # Watching makes fast blocks slow, whose bits are others: they get a pass of their own.
        apart = is_fast(model)
        watch: Any = nullcontext({}) if apart else watched(model, _looked_at, wanted)
        with watch as self.maps:
            if self.sparsified:
                self._run()
            else:
                self.logits = model(images)
        if apart:
            self.maps = self._maps(wanted)
        self.dense = self._dense_logits()

    # ---- the pass itself -------------------------------------------------------------------------

    def _run(self) -> None:
        """One pass, block by block, as the model's own loop does it."""
        model = self.model
        with watch_scorers(model) as scorings:
            run = TokenPass(model, self.pictures, every_decision=True, dense=False,
                            prefix_alone=model._prefix_alone())  # fmt: skip
            for b in range(len(run.blocks)):
                before, decided = run.state, len(run.state.index)
                run.block(b)
                step = run.step
                if step is not None and step.need_stats and step.asked is not None:
                    front = step.asked.num_prefix
                    assert step.asked.stats is not None
                    self.statistics[b] = {
                        "front": front,
                        "position": _after(step, before),
                        "statistics": step.asked.stats[:, front:],
                    }
                if len(run.state.index) > decided:
                    self.undecided = self.undecided or (b, before)
                    self.stages.append(self._stage(b, before, step, scorings.pop(b, None)))
        model._refuse_nothing_left(run.state)
        self.logits = model._head(model.norm(run.state.tokens), run.state.pooled())
        self.kept = run.state.index

    def _stage(self, b: int, before: Any, step: Any, scoring: Scoring | None) -> dict[str, Any]:
        """One decision about all images of the chunk."""
        config, position = self.model.spot_config, before.positions()
        index = step.after.index[-1]
        kept = (position[:, :, None] == index[:, None]).any(dim=2)
        scored, score, weight, effect = None, None, None, {}
        if scoring is not None:
            scored, score = "log-odds", scoring.log_odds
            effect = evidence_effects(scoring, config, self._heads())
        elif step.asked is not None and step.asked.score is not None:
            scored, score = "attention", step.asked.score
        if config.fuses and not bool(kept.all()):
            soft = torch.ones_like(kept, dtype=torch.float32)
            if scoring is not None:
                soft = scoring.keep_probability
            elif config.cuts_inside and score is not None:
                soft = score
            weight = soft.masked_fill(kept, 0)
        vote, share = self._votes(before.patches)
        return {
            "block": b, "inside": config.cuts_inside, "position": position, "kept": kept,
            "scored": scored, "score": score, "weight": weight, "effect": effect, "vote": vote,
            "share": share,
        }  # fmt: skip

    def _votes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Class [B, n] that final norm and head name for each value [B, n, C], and its share.

        The value stands at every place that a head may read: the prefix, and one patch.
        """
        model = self.model
        tokens = values.flatten(0, 1)[:, None].expand(-1, model.num_prefix_tokens + 1, -1)
        logits = model._head(model.norm(tokens), None).float()
        share, vote = logits.softmax(dim=-1).max(dim=-1)
        return vote.view(values.shape[:2]), share.view(values.shape[:2])

    # ---- beside it -------------------------------------------------------------------------------

    def _dense_logits(self) -> Tensor:
        """Logits where nothing is removed and all keys are seen.

        Up to the first decision that is the pass itself, unless its attention is sparse.
        """
        model = self.model
        with dense_attention(model):
            if not self.sparsified:
                return model(self.pictures)
            run = TokenPass(model, self.pictures, dense=False, prefix_alone=model._prefix_alone(),
                            ratios=[(1, 1)] * len(model._spot_ratios))  # fmt: skip
            first = 0
            if self.undecided is not None and not self.undecided[1].sparse:
                first, run.state = self.undecided
            return model._head(model.norm(run.run(range(first, len(run.blocks)))), None)

    def _maps(self, wanted: Sequence[int]) -> dict[int, Any]:
        """What attention of the wanted blocks did, given the same decisions."""
        given: dict[str, Any] = {} if self.kept is None else {"kept": self.kept}
        with watched(self.model, _looked_at, wanted) as seen:
            self.model(self.pictures, **given)
        return seen

    def _heads(self) -> int:
        return _attention_of(self.model).num_heads

    # ---- image by image --------------------------------------------------------------------------

    def images(self) -> Iterator[ImageTrace]:
        """The traces, with names and labels left open."""
        for i, picture in enumerate(shown(self.model, self.pictures)):
            yield ImageTrace(
                "", None, picture, _array(self.logits[i]), _array(self.dense[i]),
                [_stage_of(stage, i) for stage in self.stages], list(self._blocks(i)),
            )  # fmt: skip

    def _blocks(self, i: int) -> Iterator[BlockTrace]:
        for b in sorted(self.statistics.keys() | self.maps.keys()):
            seen, counted = self.maps.get(b), self.statistics.get(b)
            known: Any = counted or seen
            position = _array(known["position"][i], np.int32)
            block = BlockTrace(b, known["front"], position, None)
            if counted is not None:
                block.statistics = _array(counted["statistics"][i])
            if seen is not None:
                block.attention = _array(seen["weights"][i], np.float16)
                if seen["named"] is not None:
                    block.named = _array(seen["named"][i], np.int16)
                    block.held = _array(seen["held"][i], np.float16)
            yield block


def _after(step: Any, before: Any) -> Tensor:
    """Positions [B, n] of the patches that the attention of a step saw."""
    state = before if step.config.cuts_inside else step.after
    return state.positions()


def _looked_at(attended: Attended) -> dict[str, Any]:
    """The map of a block; with sparse attention how many patches each sees and what that holds."""
    logits = logits_of(attended)
    found = map_from(attended, logits)
    front = found.weights.shape[-1] - found.position.shape[1]
    named, held = None, None
    if attended.connectivity is not None:
        dense = map_from(attended._replace(connectivity=None), logits).weights
        seen = found.weights[:, :, front:] > 0
        named = seen[..., front:].float().sum(dim=-1).transpose(1, 2)
        held = (dense[:, :, front:] * seen).sum(dim=-1).transpose(1, 2)
    return {"weights": found.weights.half(), "position": found.position, "front": front,
            "named": named, "held": held}  # fmt: skip


def _stage_of(stage: dict[str, Any], i: int) -> StageTrace:
    """A decision about one image."""
    kept = _array(stage["kept"][i], bool)
    score = None if stage["score"] is None else _array(stage["score"][i])
    rank, cut = None, None
    if score is not None:
        rank = np.empty(len(score), np.int32)
        rank[np.argsort(-score, kind="stable")] = np.arange(len(score), dtype=np.int32)
        if kept.any() and not kept.all():
            cut = float((score[kept].min() + score[~kept].max()) / 2)
    return StageTrace(
        stage["block"],
        stage["inside"],
        _array(stage["position"][i], np.int32),
        kept,
        stage["scored"],
        score,
        rank,
        cut,
        None if stage["weight"] is None else _array(stage["weight"][i]),
        {group: _array(effect[i]) for group, effect in stage["effect"].items()},
        _array(stage["vote"][i], np.int32),
        _array(stage["share"][i]),
    )


def _array(x: Tensor, kind: Any = np.float32) -> np.ndarray:
    x = x.detach().cpu()
    if x.is_floating_point():
        x = x.half() if kind is np.float16 else x.float()
    return x.numpy().astype(kind, copy=False)


def _attention_of(model: Any) -> Any:
    return next(block.attn for block in blocks_of(model) if hasattr(block, "attn"))


def _blocks_with_maps(model: Any, attention: Sequence[int] | str) -> list[int]:
    blocks = blocks_of(model)
    if isinstance(attention, str):
        if attention not in ("stages", "all"):
            raise ValueError(f"attention: expected 'stages', 'all' or indices, got {attention!r}")
        if attention == "all":
            return list(range(len(blocks)))
        # The last block that sees what a decision removes: the one in front of it, or around it.
        inside = hasattr(model, "spot_config") and model.spot_config.cuts_inside
        at = [b for b, block in enumerate(blocks) if getattr(block, "stage", None) is not None]
        return sorted({b if inside else max(b - 1, 0) for b in at} | {len(blocks) - 1})
    wanted = sorted({int(b) for b in attention})
    if wanted and not 0 <= wanted[0] <= wanted[-1] < len(blocks):
        raise ValueError(f"attention: the model has blocks 0 to {len(blocks) - 1}, got {wanted}")
    return wanted


def _about(model: Any, images: Tensor, rounds: int) -> ModelTrace:
    size = tuple(images.shape[1:])
    layers, dense = layer_costs(model, images[:1], rounds)
    keep = model.spot_config.keep_ratios() if hasattr(model, "spot_config") else []
    cfg = getattr(model, "pretrained_cfg", None) or {}
    rows, columns = model.patch_embed.dynamic_feat_size(size[-2:])
    return ModelTrace(
        str(cfg.get("architecture") or type(model).__name__),
        conversion_of(model),
        [float(ratio) for ratio in keep],
        (int(rows), int(columns)),
        _prefix_names(model),
        int(_attention_of(model).num_heads),
        class_names(model, None, model.num_classes),
        layers,
        dense,
    )


def _prefix_names(model: Any) -> list[str]:
    count = prefix_of(model)
    named = ["class"] if getattr(model, "has_class_token", count > 0) else []
    if getattr(model, "dist_token", None) is not None:
        named.append("distillation")
    return (named + [f"register {k + 1}" for k in range(count)])[:count]
