"""Settings of an export: which model, at which budget, as which kind of file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spot_vit.config.evaluation import WeightFields
from spot_vit.config.fields import Fields, relation, setting

FORMATS = ("torch", "aoti", "onnx", "openvino")
"""Kinds of files: torch.export's archive, AOTInductor's package, ONNX, OpenVINO."""

OPSET = 20
"""Of ONNX, the lowest that has all operators the files need."""


@dataclasses.dataclass(frozen=True)
class BudgetFields(Fields):
    """What is kept; it is fixed in the file."""

    keep: tuple[float, ...] | None = setting(
        None, above=0, high=1, text="share of tokens, or one for each stage: 0.7 (the model's)"
    )
    attention_keep: float | None = setting(
        None, above=0, high=1, text="share of keys that each query sees (the model's)"
    )
    img_size: int | None = setting(None, low=1, text="side of the image (the model's)")


@dataclasses.dataclass(frozen=True)
class SourceFields(Fields):
    """Weights."""

    no_pretrained: bool = setting(False, text="random weights, where CHECKPOINT is timm's name")
    num_classes: int | None = setting(None, low=2, text="of the model, where nothing says it")


@dataclasses.dataclass(frozen=True)
class FileFields(Fields):
    """The file."""

    format: str = setting("onnx", choices=FORMATS, text="kind of file")
    output: str | None = setting(None, text="name of the file (the checkpoint's, in this folder)")
    force: bool = setting(False, text="replace a file of that name")
    batch_size: int = setting(8, low=1, text="images in a batch to tune for; any number will do")
    opset: int = setting(OPSET, low=OPSET, text="of ONNX's operators")
    threads: int | None = setting(None, low=1, text="CPU threads (torch's own number)")


GROUPS: tuple[type[Fields], ...] = (FileFields, BudgetFields, SourceFields, WeightFields)
"""The settings in groups, in the order of the help; a docstring is a group's title."""


@dataclasses.dataclass(frozen=True)
class ExportSettings(WeightFields, SourceFields, BudgetFields, FileFields):
    """What `spot export` is asked for, as plain data; the field `foo_bar` is its flag `--foo-bar`.

    Raises:
        ValueError: any field is of another type or out of range, or does not fit the others.
    """

    checkpoint: str = setting("", text="file or folder of a run, any saved model, or timm's name")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExportSettings:
        """Settings from what `to_dict` gave; the checkpoint has no default."""
        return cls(**data)

    @relation("checkpoint")
    def _checkpoint_is_named(self) -> str | None:
        return None if self.checkpoint else "checkpoint must name a file, a run's folder or a model"

    @relation("no_pretrained", "model")
    def _weights_are_of_one_place(self) -> str | None:
        if self.no_pretrained and self.model is not None:
            return "no_pretrained draws weights, and model says what the file's weights are of"
        return None
