"""Settings of an evaluation: which model, on which images, at which budgets, beside what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spot_vit.config.fields import Fields, mapping, relation, setting
from spot_vit.config.recipe_data import INTERPOLATIONS


@dataclasses.dataclass(frozen=True)
class ImageFields(Fields):
    """Images."""

    data: str | None = setting(
        None, text="folder of images, 'digits', or the root of --dataset (that of the run)"
    )
    dataset: str | None = setting(None, text="kind of data set as timm names it: hfds/NAME, ...")
    split: str | None = setting(None, text="name of the split, or folder (validation)")
    train_split: str = setting("train", text="split that --val-share takes images of")
    val_share: float | None = setting(
        None, above=0, high=0.9, text="share of the training images that was set aside"
    )
    synthetic: bool = setting(False, text="random images and labels instead of DATA")
    class_map: str | None = setting(None, text="file that names the classes in their order")
    input_key: str | None = setting(None, text="field of a sample with the image")
    target_key: str | None = setting(None, text="field of a sample with the label")
    num_samples: int | None = setting(
        None, low=1, text="images, of a stream that does not say it or --synthetic"
    )
    num_classes: int | None = setting(None, low=2, text="of the data, where they do not say it")
    data_args: Mapping[str, Any] = mapping(
        text="settings of ClutteredDigits for digits, else of timm's create_dataset"
    )
    img_size: int | None = setting(None, low=1, text="side of the image (the model's)")
    mean: tuple[float, ...] | None = setting(None, text="of each channel (the model's)")
    std: tuple[float, ...] | None = setting(None, above=0, text="of each channel (the model's)")
    interpolation: str | None = setting(
        None, choices=INTERPOLATIONS, text="how images are resized (the model's)"
    )
    crop_pct: float | None = setting(
        None, above=0, high=1, text="share of the side that is cropped (the model's)"
    )
    bad_share: float = setting(0.05, low=0, high=1, text="share of unreadable images that is borne")
    real_labels: str | None = setting(
        None, text="ImageNet's reassessed labels: their JSON file, or 'timm' for timm's copy"
    )


@dataclasses.dataclass(frozen=True)
class ComparisonFields(Fields):
    """What is compared."""

    keep: tuple[float, ...] | None = setting(
        None, above=0, high=1, distinct=True, text="budgets, shares of tokens: 0.5,0.7 (its own)"
    )
    attention_keep: tuple[float, ...] | None = setting(
        None, above=0, high=1, distinct=True, text="budgets of sparse attention likewise (its own)"
    )
    no_dense: bool = setting(
        False, text="leave out the same weights with nothing removed, which stand beside"
    )
    baseline: str | None = setting(
        None, text="another model to compare with: a file, a run, or timm's name"
    )


@dataclasses.dataclass(frozen=True)
class DamageFields(Fields):
    """Damaged images."""

    corruptions: tuple[str, ...] | None = setting(
        None, distinct=True, text="kinds of ImageNet-C to damage images by, or 'all' (none)"
    )
    severities: tuple[int, ...] = setting(
        (1, 2, 3, 4, 5), low=1, high=5, ascending=True, text="of damage"
    )
    imagenet_c: str | None = setting(None, text="folder of ImageNet-C: kind/severity/class/image")

    @relation("imagenet_c", "corruptions")
    def _one_damage(self) -> str | None:
        if self.imagenet_c is not None and self.corruptions:
            return (
                "imagenet_c is damage that was done already, so it goes without corruptions, "
                f"got {list(self.corruptions)}"
            )
        return None


@dataclasses.dataclass(frozen=True)
class WeightFields(Fields):
    """A file of weights that does not say what it is of."""

    model: str | None = setting(None, text="timm's name of the architecture")
    model_kwargs: Mapping[str, Any] = mapping(text="further arguments of the model")
    use_ema: bool = setting(False, text="take the averaged weights, where a file has both")

    @relation("model", "use_ema", "model_kwargs")
    def _model_is_named(self) -> str | None:
        given = [name for name in ("use_ema", "model_kwargs") if getattr(self, name)]
        if given and self.model is None:
            return f"{given[0]} needs model, which names the architecture of the file"
        return None


@dataclasses.dataclass(frozen=True)
class RunningFields(Fields):
    """How it runs."""

    batch_size: int = setting(128, low=1, text="images in a batch")
    workers: int | None = setting(
        None, low=0, text="processes that load images (4, or as many as there are CPUs)"
    )
    device: str | None = setting(None, text="cpu, cuda, ... (a GPU where there is one)")
    threads: int | None = setting(None, low=1, text="CPU threads (torch's own number)")
    amp: bool = setting(False, text="mixed precision")
    amp_dtype: str = setting("bfloat16", choices=("bfloat16", "float16"), text="of --amp")
    channels_last: bool = setting(False, text="memory format of images and weights")
    compile: bool = setting(False, text="compile the model")
    seed: int = setting(42, low=0, text="of selection at random, and of what --val-share set aside")
    speed: float = setting(
        10.0, low=0, text="seconds to spend on measuring images/s, 0 for not at all"
    )


@dataclasses.dataclass(frozen=True)
class WrittenFields(Fields):
    """What is written."""

    output: str = setting("spot-eval.json", text="file to write everything to")
    results_format: str | None = setting(
        None, choices=("json", "csv"), text="everything as json, or the table as csv (by the name)"
    )
    predictions: str | None = setting(None, text="CSV file to write what is said of each image to")
    per_class: bool = setting(False, text="print every class, however many there are")


GROUPS: tuple[type[Fields], ...] = (
    ImageFields,
    ComparisonFields,
    DamageFields,
    WeightFields,
    RunningFields,
    WrittenFields,
)
"""The settings in groups, in the order of the help; a docstring is a group's title."""


@dataclasses.dataclass(frozen=True)
class EvaluationSettings(  # a dataclass collects the fields of its bases from the last to the first
    WrittenFields,
    RunningFields,
    WeightFields,
    DamageFields,
    ComparisonFields,
    ImageFields,
):
    """What `spot eval` is asked for, as plain data; the field `foo_bar` is its flag `--foo-bar`.

    Names are those of timm's validation script wherever that has the same. None stands for what a
    field's text has in parentheses.

    Raises:
        ValueError: any field is of another type or out of range, or does not fit the others. The
            message has a line for each problem.
    """

    checkpoint: str = setting("", text="file or folder of a run, any saved model, or timm's name")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationSettings:
        """Settings from what `to_dict` gave; the checkpoint has no default."""
        return cls(**data)

    @relation("checkpoint")
    def _checkpoint_is_named(self) -> str | None:
        return None if self.checkpoint else "checkpoint must name a file, a run's folder or a model"

    @property
    def as_csv(self) -> bool:
        """Whether the file to write is a table."""
        return (self.results_format or self.output.rpartition(".")[2].lower()) == "csv"
