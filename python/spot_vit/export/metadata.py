"""What a file says of itself: where it comes from, what goes in and comes out, what it needs."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import timm
import torch
from torch import nn

import spot_ext
from spot_vit.config.conversion import conversion_of
from spot_vit.measure.flops import gmacs_of
from spot_vit.models.named import NAMED
from spot_vit.models.saved import class_names, preprocessing
from spot_vit.utils.errors import UserError
from spot_vit.utils.sizes import input_size

_LIBRARIES = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}


def describe(
    model: Any,
    format: str,
    outputs: Sequence[Sequence[int | str]],
    operators: Sequence[str],
    *,
    size: tuple[int, int, int],
    classes: Sequence[str] | None,
    data_config: Mapping[str, Any] | None,
    opset: int | None,
) -> dict[str, Any]:
    """The metadata of a file, as JSON takes it.

    Args:
        model: that is exported.
        format: of the file.
        outputs: their shapes.
        operators: of SPOT that the file calls.
        size: channels, height and width of an image.
        classes: their names; by default those the model came with.
        data_config: what differs from the preprocessing that the model came with.
        opset: of ONNX, if the file is made of it.

    Raises:
        ValueError: `classes` or `data_config` does not fit the model.
    """
    held = dict(getattr(model, "pretrained_cfg", None) or {})
    name = held.get("architecture") or type(model).__name__
    conversion = conversion_of(model)
    names = ["logits", *(f"kept_{k + 1}" for k in range(len(outputs) - 1))]
    count = int(outputs[0][-1])
    libraries = {library: version(library) for library in _LIBRARIES.get(format, ())}
    return {
        "format": format,
        "architecture": NAMED.get(name, name),
        "conversion": conversion,
        "keep": conversion.get("spot", {}).get("keep"),
        "attention_keep": conversion.get("sparsifiner", {}).get("keep_rate"),
        "classes": class_names(model, classes, count),
        "data_config": preprocessing(model, {**(data_config or {}), "input_size": size}),
        "gmacs": gmacs_of(model, size),
        "inputs": {"images": ["batch", *size]},
        "outputs": dict(zip(names, map(list, outputs), strict=True)),
        "operators": list(operators),
        "opset": opset,
        "needs": _needs(format, operators, opset),
        "versions": {
            "spot": spot_ext.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            **libraries,
        },
    }


def size_for(model: nn.Module, image_size: int | None) -> tuple[int, int, int]:
    """Channels, height and width of the images of a file.

    Raises:
        UserError: the model was built for another size.
    """
    built = input_size(model)
    if image_size is None or built[1:] == (image_size, image_size):
        return built
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) is not None and getattr(embed, "strict_img_size", True):
        raise UserError(
            f"this model is built for {built[1]}x{built[2]} pixels and cannot take {image_size}: "
            f"call model.set_input_size(img_size=({image_size}, {image_size})) first"
        )
    return built[0], image_size, image_size


def _needs(format: str, operators: Sequence[str], opset: int | None) -> str:
    """What must be there to run a file, in words."""
    if format in ("onnx", "openvino"):
        runtime = "a runtime of ONNX" if format == "onnx" else "OpenVINO"
        return f"{runtime}; operators are standard ones (opset {opset})"
    needed = f"torch {torch.__version__.partition('+')[0]} or newer"
    if format == "aoti":
        needed = f"torch {torch.__version__.partition('+')[0]}, {platform.machine()}"
    if operators:
        needed += f", and spot_ext {spot_ext.__version__}: pip install spot-vit, import spot_ext"
    return needed
