"""Parameter groups for training a SPOT model from a pretrained backbone."""

from __future__ import annotations

from typing import Any

from timm.models import group_parameters
from torch import nn

from spot_vit.models.lvvit import LVViT
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.utils.modes import unwrap

HEADS = ("auto", "new", "pretrained")


def param_groups(
    model: Any,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    backbone_lr_scale: float = 0.01,
    freeze_epochs: int = 5,
    frozen: tuple[str, ...] = ("cls_token", "pos_embed"),
    *,
    head: str = "auto",
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of DynamicViT's recipe (published in its code; the paper's is not known to us).

    Predictors train at `lr`, and so does a new classifier head (our choice); the backbone at
    `lr * backbone_lr_scale`, and not at all during the first `freeze_epochs` epochs; `frozen`
    parameters are in no group. Biases, norms and what the model excludes are not decayed.

    Each group's `lr` is its whole rate: schedulers of torch and timm, which scale it, need nothing
    else. What they call the smallest rate, or the one that warm-up starts from, is absolute, and
    the same for all groups. `freeze_epochs` is read by `fit` alone; with another loop give 0.

    Args:
        model: a converted model, wrapped or not.
        lr: peak rate of predictors and of a new head.
        weight_decay: of matrices.
        backbone_lr_scale: rate of the backbone as a share of `lr`.
        freeze_epochs: epochs at the start in which the backbone rests.
        frozen: names of parameters that never move.
        head: "new" trains the classifier as predictors are trained, "pretrained" as the backbone
            (DynamicViT's recipe, with ImageNet's classes); "auto" takes it for pretrained where it
            has as many classes as the weights that timm has under the model's name.
        layer_decay: factor of the backbone's rate from each layer to the one below, as timm's, by
            the model's `group_matcher`; the last layer has `lr * backbone_lr_scale`. None for none.

    Returns:
        Groups for a torch optimizer, each with `params`, `lr`, `weight_decay`, `name` and
        `freeze_epochs`.

    Raises:
        ValueError: another `head`, or a `layer_decay` that is not in (0, 1].
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {list(HEADS)}, got {head!r}")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay!r}")
    model = unwrap(model)
    own = predictor_parameters(model)
    new = head == "new" or (head == "auto" and _is_new(model))
    new_head = head_parameters(model) if new else set()
    layers = {} if layer_decay is None else _layers(model)
    top = max(layers.values(), default=0)
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name in frozen:
            continue
        decay = parameter.ndim > 1 and name not in exempt
        scale, rest = 1.0, 0
        if name in own:
            label = "predictor"
        elif name in new_head:
            label = "head"
        else:
            label, scale, rest = "backbone", backbone_lr_scale, freeze_epochs
            if layer_decay is not None:
                label += f"_{layers[name]}"
                scale *= layer_decay ** (top - layers[name])
        label += "" if decay else "_no_decay"
        group = groups.setdefault(
            label,
            {
                "name": label,
                "params": [],
                "lr": lr * scale,
                "weight_decay": weight_decay if decay else 0.0,
                "freeze_epochs": rest,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter by its name, from 0 for the stem on."""
    matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
    return group_parameters(model, matcher, reverse=True)


def _is_new(model: Any) -> bool:
    """Whether the head has other classes than the weights that timm has for the model."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("num_classes") != getattr(model, "num_classes", None)


def head_parameters(model: Any) -> set[str]:
    """Names of the parameters of the classifier, or classifiers."""
    config = getattr(model, "pretrained_cfg", None) or {}
    classifier = config.get("classifier") or "head"
    modules = [classifier] if isinstance(classifier, str) else list(classifier)
    if isinstance(model, LVViT):
        modules.append("aux_head")
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if name.startswith(tuple(f"{m}." for m in modules))}
