"""A recipe: everything that decides a training run, behind flags, yaml and the run's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spot_vit.config.fields import Fields, nearest, raise_all
from spot_vit.config.methods import METHODS
from spot_vit.config.recipe_data import AugmentationFields, DataFields
from spot_vit.config.recipe_model import DENSE, ModelFields, SparsityFields, TeacherFields
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
            lines = str(error).split("\n  ")
            problems += lines[1:] if len(lines) > 1 else lines
        raise_all(cls.__name__, problems)
        return recipe

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
