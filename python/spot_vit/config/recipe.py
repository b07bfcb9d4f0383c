"""A recipe: everything that decides a training run, behind flags, yaml and the run's folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from spot_vit.config.fields import Fields, nearest, problem_lines, raise_all, relation
from spot_vit.config.methods import METHODS
from spot_vit.config.recipe_data import AugmentationFields, DataFields
from spot_vit.config.recipe_model import DENSE, STAGES, ModelFields, SparsityFields, TeacherFields
from spot_vit.config.recipe_training import MachineFields, OptimizerFields, OutputFields
from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.config.spot import SpotConfig

GROUPS: tuple[type[Fields], ...] = (
    DataFields,
    ModelFields,
    SparsityFields,
    TeacherFields,
    OptimizerFields,
    AugmentationFields,
    MachineFields,
    OutputFields,
)
"""The fields of a recipe in groups, in the order of the help; a docstring is a group's title."""


@dataclasses.dataclass(frozen=True)
class Recipe(  # a dataclass collects the fields of its bases from the last to the first
    OutputFields,
    MachineFields,
    AugmentationFields,
    OptimizerFields,
    TeacherFields,
    SparsityFields,
    ModelFields,
    DataFields,
):
    """Everything that decides a training run, as plain data.

    The field `foo_bar` is the flag `--foo-bar` of `spot train` and a key of its yaml; names are
    those of timm's training script wherever that has the same. Each field says what it is in its
    `Rule` (`Recipe.rules()["keep"]`), and None stands for what its text has in parentheses.

    Raises:
        ValueError: any field is of another type or out of range, or does not fit the others. The
            message has a line for each problem.
    """

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from fields by name; those that are absent have their defaults.

        Raises:
            ValueError: names that are no fields, beside everything else that is wrong; a line each.
        """
        known = {name: value for name, value in data.items() if name in cls.names()}
        problems = [
            f"{name} is no field of a recipe{nearest(name, cls.names())}"
            for name in data
            if name not in known
        ]
        try:
            recipe = cls(**known)
        except ValueError as error:
            problems += problem_lines(error)
        raise_all(cls.__name__, problems)
        return recipe

    # ---- what fields ask of each other -------------------------------------------------------

    @relation(
        "method", "keep", "at", "features", "soft", "train_decision", "noise", "spot",
        "sampled_keep",
    )  # fmt: skip
    def _tokens_can_go(self) -> str | None:
        return self._misfit("spot", SpotConfig, self.spot_config)

    @relation("attention_keep", "sparsifiner")
    def _attention_can_be_sparse(self) -> str | None:
        if self.attention_keep is None and self.sparsifiner:
            return "sparsifiner says how attention is sparse: attention_keep must say how much"
        return self._misfit("sparsifiner", SparsifinerConfig, self.sparsifiner_config)

    def _misfit(
        self, name: str, kind: type[Fields], make: Callable[[], Fields | None]
    ) -> str | None:
        """What keeps fields of the recipe and further ones from making a configuration."""
        taken = {"keep_rate": "attention_keep"} if kind is SparsifinerConfig else {}
        problems = []
        for field in getattr(self, name):
            own = taken.get(field, field)
            if own in self.names():
                problems.append(f"{name}: {field} is the recipe's own field {own}")
            elif field not in kind.names():
                known = nearest(field, kind.names())
                problems.append(f"{name}: {field} is no field of {kind.__name__}{known}")
        if not problems:
            try:
                make()
            except ValueError as error:
                problems = problem_lines(error)
        return "; ".join(problems) or None

    @relation("method", "train_decision", "spot", "sampled_keep", "keep_epochs")
    def _budgets_can_change(self) -> str | None:
        if self.sampled_keep is None and self.keep_epochs is None:
            return None
        if not self.sparse:
            return f"sampled_keep and keep_epochs need a method that removes tokens, got {DENSE!r}"
        if self.sampled_keep is not None and self.keep_epochs is not None:
            return "sampled_keep and keep_epochs both say what keep is at a step: give one"
        drawn = self.sampled_keep is not None and METHODS[self.method].evidence
        if drawn and self.train_decision not in (None, "topk"):
            return (
                "sampled_keep needs train_decision='topk', which meets every budget exactly, got "
                f"{self.train_decision!r}"
            )
        return None

    @relation("sampled_keep", "keep_epochs", "scale", "ratio")
    def _pairs_ascend(self) -> str | None:
        pairs = {n: getattr(self, n) for n in ("sampled_keep", "keep_epochs", "scale", "ratio")}
        wrong = [f"{n}={list(pair)}" for n, pair in pairs.items() if pair and pair[0] > pair[1]]
        return f"expected the smaller number first, got {', '.join(wrong)}" if wrong else None

    @relation("stage", "attention_keep")
    def _stage_has_a_predictor(self) -> str | None:
        if self.stage != STAGES[0] or self.attention_keep is not None:
            return None
        return (
            f"stage {self.stage!r} trains the predictors of sparse attention: give attention_keep"
        )

    @relation("self_distillation", "attention_keep", "method")
    def _self_distillation_sees_the_grid(self) -> str | None:
        if not self.self_distillation:
            return None
        if self.attention_keep is None:
            return "self_distillation is of the predictors of sparse attention: give attention_keep"
        if self.sparse and not METHODS[self.method].evidence:
            return (
                "self_distillation compares attention over the whole grid, and training with "
                f"method {self.method!r} removes tokens"
            )
        return None

    @relation("teacher", "dense_epochs", "method", "attention_keep")
    def _somebody_is_taught(self) -> str | None:
        if self.sparse or self.attention_keep is not None:
            return None
        given = [name for name in ("teacher", "dense_epochs") if getattr(self, name)]
        if not given:
            return None
        return (
            f"{given[0]} is for sparse models, and this one stays dense: give a method or "
            "attention_keep"
        )

    @relation("mixup", "cutmix", "batch_size")
    def _mixed_batches_are_even(self) -> str | None:
        if not (self.mixup or self.cutmix) or self.batch_size % 2 == 0:
            return None
        return f"batch_size must be even where mixup or cutmix is on, got {self.batch_size}"

    @relation("bce_loss", "bce_sum", "bce_target_thresh")
    def _bce_is_on(self) -> str | None:
        if self.bce_loss or not (self.bce_sum or self.bce_target_thresh is not None):
            return None
        return "bce_sum and bce_target_thresh belong to bce_loss, which is off"

    @relation("synthetic", "val_share")
    def _share_can_be_split_off(self) -> str | None:
        if self.val_share is None or not self.synthetic:
            return None
        return "val_share splits DATA, and synthetic takes none"

    @relation("device")
    def _device_is_known(self) -> str | None:
        if self.device is None or re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            return None
        return f"device must be cpu, cuda or cuda:N, got {self.device!r}"

    # ---- what follows from the fields --------------------------------------------------------

    @property
    def sparse(self) -> bool:
        """Whether tokens are removed."""
        return self.method != DENSE

    def spot_config(self) -> SpotConfig | None:
        """The configuration of `sparsify`, or None where no token is removed."""
        if not self.sparse:
            return None
        own = {name: getattr(self, name) for name in ("method", "keep", "at", "soft", "noise")}
        if self.features is not None:
            own["features"] = self.features
        if self.train_decision is not None:
            own["train_decision"] = self.train_decision
        elif self.sampled_keep is not None:
            own["train_decision"] = "topk"
        return SpotConfig(**{**own, **self.spot})

    def sparsifiner_config(self) -> SparsifinerConfig | None:
        """The configuration of `sparsify_attention`, or None where attention stays dense."""
        if self.attention_keep is None:
            return None
        return SparsifinerConfig(keep_rate=self.attention_keep, **self.sparsifiner)

    @property
    def starts_trained(self) -> bool:
        """Whether the sparse model starts from weights that were trained."""
        return self.pretrained or self.initial_checkpoint is not None or self.dense_epochs > 0

    def backbone_rate(self) -> tuple[float, int]:
        """`backbone_lr_scale` and `freeze_epochs` with numbers in place of None.

        DynamicViT's 0.01 and 5 where predictors are learned on a trained backbone; else 1 and 0.
        """
        learned = self.sparse and bool(METHODS[self.method].evidence)
        published = learned and self.starts_trained
        scale = self.backbone_lr_scale
        if scale is None:
            scale = 0.01 if published else 1.0
        if self.freeze_epochs is not None:
            return scale, self.freeze_epochs
        return scale, min(5, self.epochs - 1) if published and scale <= 0.01 else 0
