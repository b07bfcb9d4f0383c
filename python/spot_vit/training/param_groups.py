"""Parameter groups for training a SPOT model from a pretrained backbone."""

from __future__ import annotations

from typing import Any

from spot_vit.nn.predictor import predictor_parameters
from spot_vit.utils.modes import unwrap


def param_groups(
    model: Any,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    backbone_lr_scale: float = 0.01,
    freeze_epochs: int = 5,
    frozen: tuple[str, ...] = ("cls_token", "pos_embed"),
) -> list[dict[str, Any]]:
    """Groups of DynamicViT's recipe (published in its code; the paper's is not known to us).

    Predictors train at `lr`; the backbone at `lr * backbone_lr_scale`, and not at all during the
    first `freeze_epochs` epochs; `frozen` parameters are in no group. Biases, norms and what the
    model excludes are not decayed.

    Args:
        model: a converted model, wrapped or not.
        lr: peak rate of predictors.
        weight_decay: of matrices.
        backbone_lr_scale: rate of the backbone as a share of `lr`.
        freeze_epochs: epochs at the start in which the backbone rests.
        frozen: names of parameters that never move.

    Returns:
        Groups for a torch optimizer, each with `params`, `lr`, `weight_decay`, and for schedulers
        `name`, `lr_scale` and `freeze_epochs`.
    """
    model = unwrap(model)
    own = predictor_parameters(model)
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name in frozen:
            continue
        predictor = name in own
        decay = parameter.ndim > 1 and name not in exempt
        scale = 1.0 if predictor else backbone_lr_scale
        label = ("predictor" if predictor else "backbone") + ("" if decay else "_no_decay")
        group = groups.setdefault(
            label,
            {
                "name": label,
                "params": [],
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": weight_decay if decay else 0.0,
                "freeze_epochs": 0 if predictor else freeze_epochs,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
