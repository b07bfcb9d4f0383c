"""Settings of a benchmark of a model: what is timed beside the dense model, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spot_vit.config.fields import Fields, mapping, relation, setting
from spot_vit.config.methods import METHODS

RUNTIMES = ("eager", "compiled", "fast", "aoti", "onnx", "openvino")
"""What can run a model: torch, torch.compile, `spot_vit.fast`, and files of `spot export`."""

FILES = ("aoti", "onnx", "openvino")
"""Runtimes that run an exported file."""

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class SideFields(Fields):
    """What is timed."""

    batch_size: tuple[int, ...] = setting((1, 8), low=1, distinct=True, text="images in a batch")
    keep: tuple[float, ...] | None = setting(
        None, above=0, high=1, distinct=True, text="shares of tokens: 0.5,0.7 (0.7, or the model's)"
    )
    runtimes: tuple[str, ...] | None = setting(
        None, choices=RUNTIMES, distinct=True, text="what runs it (all that are there)"
    )
    method: str | None = setting(
        None, choices=lambda: tuple(METHODS), text="how tokens are scored (the default method)"
    )
    at: tuple[int, ...] | None = setting(
        None, low=0, ascending=True, text="blocks in front of which tokens go (three, evenly)"
    )
    attention_keep: float | None = setting(
        None, above=0, high=1, text="share of keys that each query sees (all, or the model's)"
    )
    no_peers: bool = setting(False, text="leave out other packages that are installed")
    layers: bool = setting(False, text="also where the time goes, layer by layer")


@dataclasses.dataclass(frozen=True)
class ModelFields(Fields):
    """The model."""

    img_size: int | None = setting(None, low=1, text="side of the image (the model's)")
    pretrained: bool = setting(False, text="timm's weights instead of random ones")
    model_kwargs: Mapping[str, Any] = mapping(text="further arguments of timm's model")


@dataclasses.dataclass(frozen=True)
class RunningFields(Fields):
    """How it runs."""

    device: str = setting("cpu", text="cpu or cuda")
    dtype: str = setting("float32", choices=DTYPES, text="of weights, images and arithmetic")
    threads: int | None = setting(None, low=1, high=1024, text="CPU threads (torch's own number)")
    seconds: float = setting(5.0, low=0, text="to time each batch size for, at least")
    patience: float = setting(10.0, low=0, text="seconds to wait for a quiet machine")


@dataclasses.dataclass(frozen=True)
class WrittenFields(Fields):
    """What is written."""

    output: str = setting(
        "spot-bench.json", text="JSON file; the picture stands beside it, as .png"
    )


GROUPS: tuple[type[Fields], ...] = (SideFields, ModelFields, RunningFields, WrittenFields)
"""The settings in groups, in the order of the help; a docstring is a group's title."""


@dataclasses.dataclass(frozen=True)
class BenchSettings(WrittenFields, RunningFields, ModelFields, SideFields):
    """What `spot bench MODEL` is asked for, as plain data; the field `foo_bar` is `--foo-bar`.

    Raises:
        ValueError: any field is of another type or out of range, or does not fit the others.
    """

    model: str = setting("", text="timm's name (random weights), a file of save, or a run's folder")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BenchSettings:
        """Settings from what `to_dict` gave; the model has no default."""
        return cls(**data)

    @relation("model")
    def _model_is_named(self) -> str | None:
        return None if self.model else "model must name one of timm, a file, or a run's folder"

    @relation("output")
    def _output_is_json(self) -> str | None:
        if self.output.endswith(".json"):
            return None
        return f"output must end in .json, got {self.output!r}"

    @property
    def picture(self) -> str:
        """The file of the picture."""
        return self.output.removesuffix(".json") + ".png"
