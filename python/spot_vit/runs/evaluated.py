"""Models that are evaluated, from wherever they come, and the images that they are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import load_checkpoint

from spot_vit.config.evaluation import EvaluationSettings
from spot_vit.config.fields import near_names
from spot_vit.config.methods import METHODS
from spot_vit.config.recipe import Recipe
from spot_vit.config.recipe_files import RUN, read
from spot_vit.data.open import Data, open_data
from spot_vit.export.formats import ENDINGS
from spot_vit.export.opened import Exported, open_exported
from spot_vit.models.saved import load
from spot_vit.utils.errors import UserError
from spot_vit.utils.sizes import input_size

EXPORTED = frozenset(ENDINGS.values())
"""How names of exported files end."""

_OF_A_RUN = {
    name: name
    for name in (
        "dataset", "class_map", "input_key", "target_key", "num_classes", "data_args", "seed",
        "train_split", "val_share", "synthetic", "bad_share",
    )
} | {"split": "val_split", "num_samples": "val_num_samples"}  # fmt: skip
"""Settings that say what the images are, and what a recipe calls them."""


@dataclass
class Evaluated:
    """A model to evaluate.

    Attributes:
        source: what the user named.
        model: in eval mode, on the CPU.
        label: what it is, in words.
        classes: names of its classes in the order of its logits; None where nobody knows.
    """

    source: str
    model: Any
    label: str
    classes: list[str] | None

    @property
    def num_classes(self) -> int | None:
        """Number of logits, where the model says it."""
        return getattr(self.model, "num_classes", None)


def load_evaluated(source: str, settings: EvaluationSettings, name: str | None) -> Evaluated:
    """A model from a file, a run's folder, or timm's name.

    Args:
        source: which one; files of `spot export` too.
        settings: with `name`, further arguments and whether averaged weights are taken.
        name: timm's name of the architecture, for a file that does not say it.

    Raises:
        UserError: there is no such file and no such model, or it cannot be loaded.
    """
    path = Path(source)
    if name is not None:
        model = _weights_of(path, name, settings)
    elif path.suffix in EXPORTED and path.is_file():
        model = _exported(path, settings)
    elif path.exists():
        try:
            model = load(path)
        except UserError as error:
            if path.suffix in (".pth", ".pt", ".tar", ".bin", ".safetensors"):
                raise UserError(f"{error}; or name it with --model NAME") from error
            raise
    elif timm.is_model(source):
        model = _pretrained(source)
    else:
        kinds = "a file or run folder, nor a model of timm"
        raise UserError(f"{source} is neither {kinds}{near_names(source, timm.list_models())}")
    if not isinstance(model, Exported):
        resized(model, source, settings.img_size)
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return Evaluated(source, model.eval(), _label(model), None if names is None else list(names))


def untrained(name: str, side: int | None = None, **arguments: Any) -> Any:
    """A model of timm with random weights, the same ones each time, in eval mode.

    Args:
        name: timm's, which it knows.
        side: of the image, pixels; the model's by default.
        **arguments: of `timm.create_model`.

    Raises:
        UserError: it cannot be built, or not for this size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, pretrained=False, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{name} cannot be built: {error}") from error
    return resized(model, name, side).eval()


def _weights_of(path: Path, name: str, settings: EvaluationSettings) -> Any:
    if not path.is_file():
        raise UserError(f"there is no file {path} to load into {name}")
    if not timm.is_model(name):
        raise UserError(f"timm knows no model {name!r}{near_names(name, timm.list_models())}")
    given = dict(settings.model_kwargs)
    if settings.num_classes is not None:
        given.setdefault("num_classes", settings.num_classes)
    if settings.img_size is not None:
        given.setdefault("img_size", settings.img_size)
    try:
        model = timm.create_model(name, **given)
        load_checkpoint(model, str(path), use_ema=settings.use_ema)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{path} does not load into {name}: {error}") from error
    return model


def _exported(path: Path, settings: EvaluationSettings) -> Exported:
    """A file of `spot export`, whose images and arithmetic are what they are."""
    model = open_exported(path, settings.threads)
    height, width = model.pretrained_cfg["input_size"][1:]
    if settings.img_size not in (None, height) or (settings.img_size and height != width):
        raise UserError(
            f"img_size: {path} was exported for {height}x{width} pixels, and takes no others"
        )
    if settings.amp or settings.compile:
        flag = "amp" if settings.amp else "compile"
        raise UserError(f"{flag}: {path} is run as it was exported, so leave --{flag} out")
    return model


def resized(model: Any, source: str, side: int | None) -> Any:
    """The model, which was built for images of one size, taking another.

    Raises:
        UserError: it cannot.
    """
    embed: Any = getattr(model, "patch_embed", None)
    fixed = getattr(embed, "img_size", None) is not None and getattr(embed, "strict_img_size", True)
    if side is None or not fixed or tuple(embed.img_size) == (side, side):
        return model
    try:
        model.set_input_size(img_size=(side, side))
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        built = "x".join(map(str, embed.img_size))
        raise UserError(
            f"img_size: {source} is built for {built} pixels and cannot take {side}: "
            f"{_first_line(error)}"
        ) from error
    return model


def _pretrained(name: str) -> Any:
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # timm's, the Hub's, and those of the network have no common base
        raise UserError(
            f"weights of {name} could not be had ({type(error).__name__}: {_first_line(error)}); "
            f"give a file, with --model {name}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _label(model: Any) -> str:
    """The architecture, and what was made of it."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    parts = [cfg.get("architecture") or type(model).__name__]
    if isinstance(model, Exported):
        kept = model.metadata["keep"], model.metadata["attention_keep"]
        words = [f"{w} {k}" for w, k in zip(("keep", "attention keep"), kept, strict=True) if k]
        return ", ".join([*parts, *words, f"{model.format} file"])
    if hasattr(model, "spot_config"):
        parts.append(METHODS[model.spot_config.method].label)
    if hasattr(model, "sparsifiner_config"):
        parts.append("sparse attention")
    return ", ".join(parts)


def settings_of_run(settings: EvaluationSettings) -> EvaluationSettings:
    """The settings, with what the run says of its data where the checkpoint is one of a run.

    So images of a run are those that it evaluated on. Nothing is taken from it where other data are
    named, and nothing that is set otherwise here.

    Raises:
        UserError: no data are named, and the checkpoint is not in the folder of a run.
    """
    path = Path(settings.checkpoint)
    folder = path if path.is_dir() else path.parent
    recipe = None
    if path.exists() and (folder / RUN).is_file():
        try:
            recipe = Recipe.from_dict(read(str(folder)))
        except ValueError as error:
            raise UserError(f"{folder / RUN} is no recipe: {error}") from error
    if settings.synthetic:
        return settings.replace(data=settings.data or "random images")
    if settings.data is None and recipe is None:
        raise UserError(
            "name the data to evaluate on: a folder of images, or digits (only a checkpoint in the "
            "folder of its run can do without)"
        )
    named = settings.data is not None
    if recipe is None or (named and (recipe.synthetic or settings.data != recipe.data)):
        return settings
    default = {field.name: field.default for field in dataclasses.fields(settings)}
    own = {
        name: getattr(recipe, theirs)
        for name, theirs in _OF_A_RUN.items()
        if not getattr(settings, name) or getattr(settings, name) == default[name]
    }
    return settings.replace(data=recipe.data, **own)


def data_config(evaluated: Evaluated, settings: EvaluationSettings) -> dict[str, Any]:
    """How images are made ready for a model, as timm has it: what is asked for, else its own."""
    names = ("img_size", "mean", "std", "interpolation", "crop_pct")
    given = {name: getattr(settings, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    own = dict(getattr(evaluated.model, "pretrained_cfg", None) or {})
    if not isinstance(evaluated.model, Exported):
        own["input_size"] = input_size(evaluated.model)
    return resolve_data_config(given, pretrained_cfg=own)


def open_for(evaluated: Evaluated, settings: EvaluationSettings, folder: str | None = None) -> Data:
    """The images that a model is shown, with labels in the order of its logits.

    Args:
        evaluated: the model.
        settings: which images.
        folder: another folder of images, with the same classes.

    Raises:
        UserError: they cannot be opened, or their classes are not those of the model.
    """
    assert settings.data is not None
    common: dict[str, Any] = {"train": False, "val_split": settings.split or "validation"}
    if folder is None:
        common |= {
            "dataset": settings.dataset or "",
            "class_map": settings.class_map,
            "input_key": settings.input_key,
            "target_key": settings.target_key,
            "val_num_samples": settings.num_samples,
            "train_split": settings.train_split,
            "val_share": settings.val_share,
            "seed": settings.seed,
            "synthetic": settings.synthetic,
            "data_args": settings.data_args,
            "num_classes": settings.num_classes,
            "batch_size": settings.batch_size,
        }
    where = settings.data if folder is None else folder
    if evaluated.classes is not None:
        return open_data(where, classes=evaluated.classes, **common)
    data = open_data(where, **common)
    number = evaluated.num_classes
    if settings.class_map is not None or number in (None, data.num_classes):
        return data
    if data.classes is None:
        data.notes.append(
            f"labels are taken for numbers of the model's {number} classes: nobody knows the names "
            f"of these {data.num_classes}"
        )
        return data
    if (order := _imagenet(evaluated.model, data.classes)) is not None:
        return open_data(where, classes=order, **common)
    raise UserError(
        f"{evaluated.source} knows {number} classes without their names, and {where} has "
        f"{data.num_classes}: whose is which cannot be told; --class-map FILE names the model's "
        "classes in their order"
    )


def _imagenet(model: Any, names: Sequence[str]) -> list[str] | None:
    """ImageNet's classes in the order of the logits, if that is what these data are of."""
    subset = infer_imagenet_subset(model)
    if subset is None:
        return None
    order = ImageNetInfo(subset).label_names()
    return order if set(names) <= set(order) else None
