"""Fields of a recipe that say what is trained: the model, its sparsity, its teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spot_vit.config.fields import Fields, mapping, setting
from spot_vit.config.methods import FEATURES, METHODS
from spot_vit.config.spot import SOFT, TRAIN_DECISIONS, SpotConfig

DENSE = "dense"
"""In place of a method: no token is removed."""

HEADS = ("auto", "new", "pretrained", "linear", "finetune")
STAGES = ("connectivity", "finetune", "both")


def methods() -> tuple[str, ...]:
    """What `method` may be: none, and the rows of the table."""
    return (DENSE, *METHODS)


@dataclasses.dataclass(frozen=True)
class ModelFields(Fields):
    """Model."""

    model: str = setting("deit_tiny_patch16_224", text="name of the dense model in timm")
    pretrained: bool = setting(False, text="start from the weights that timm has for it")
    initial_checkpoint: str | None = setting(None, text="file with weights to start from")
    model_kwargs: Mapping[str, Any] = mapping(text="further arguments of timm's create_model")
    num_classes: int | None = setting(None, low=1, text="number of classes (the data's)")
    img_size: int | None = setting(None, low=1, text="side of the images, pixels (the model's)")
    in_chans: int | None = setting(None, low=1, text="channels of the images (the data's)")
    drop: float = setting(0.0, low=0, high=0.999, text="dropout")
    drop_path: float | None = setting(None, low=0, high=0.999, text="stochastic depth")
    head: str = setting(
        "auto",
        choices=HEADS,
        text="classifier; linear: it alone learns",
    )
    backbone_lr_scale: float | None = setting(
        None,
        low=0,
        text="backbone's rate by lr (0.01 where predictors join trained weights)",
    )
    freeze_epochs: int | None = setting(
        None, low=0, text="first epochs in which the backbone rests (5 where its scale is 0.01)"
    )


@dataclasses.dataclass(frozen=True)
class SparsityFields(Fields):
    """Sparsity."""

    method: str = setting(
        SpotConfig.method, choices=methods, text="how tokens are scored, if at all"
    )
    keep: float | tuple[float, ...] = setting(
        SpotConfig.keep,
        low=1e-6,
        high=1,
        text="share of tokens kept at each stage, or one cumulative share for each",
    )
    at: tuple[int, ...] | None = setting(
        None, low=0, ascending=True, text="blocks before which tokens go (each quarter)"
    )
    features: tuple[str, ...] | None = setting(
        None, choices=FEATURES, distinct=True, text="evidence that predictors see (all)"
    )
    soft: str | None = setting(None, choices=SOFT, text="whether removed tokens leave one behind")
    train_decision: str | None = setting(
        None, choices=TRAIN_DECISIONS, text="draw in training (topk where budgets are sampled)"
    )
    noise: float | None = setting(None, low=0, text="scale of that draw's noise")
    spot: Mapping[str, Any] = mapping(text="further fields of SpotConfig")
    attention_keep: float | None = setting(
        None, above=0, high=1, text="share of keys that each query sees (attention stays dense)"
    )
    sparsifiner: Mapping[str, Any] = mapping(text="further fields of SparsifinerConfig")
    sampled_keep: tuple[float, float] | None = setting(
        None, above=0, high=1, text="draw keep anew at every step, LO HI"
    )
    keep_epochs: tuple[float, float] | None = setting(
        None, low=0, text="epochs between which keep falls from 1 to its value, FROM TO"
    )


@dataclasses.dataclass(frozen=True)
class TeacherFields(Fields):
    """Teacher and losses."""

    teacher: str | None = setting(None, text="dense teacher: a name in timm, or a file")
    dense_epochs: int = setting(
        0, low=0, text="train the dense model first so long: start and teacher of the sparse one"
    )
    dense_lr: float | None = setting(None, above=0, text="peak rate of those epochs (lr)")
    stage: str = setting("both", choices=STAGES, text="of a sparse attention's training")
    connectivity_epochs: int = setting(5, low=1, text="epochs of the stage connectivity")
    connectivity_lr: float = setting(3e-4, above=0, text="peak rate of the stage connectivity")
    connectivity_min_lr: float | None = setting(
        None, low=0, text="last rate of the stage connectivity (min_lr)"
    )
    self_distillation: float = setting(
        0.0, low=0, text="weight of the connectivity's loss in the stage finetune"
    )
    ce_weight: float = setting(1.0, low=0, text="weight of the labels' loss")
    kl_weight: float = setting(0.5, low=0, text="weight of the teacher's logits")
    token_weight: float = setting(0.5, low=0, text="weight of the teacher's tokens")
    ratio_weight: float = setting(2.0, low=0, text="weight of the kept shares' distance from keep")
