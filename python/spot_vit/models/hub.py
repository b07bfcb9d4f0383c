"""What a Hub folder says of a sparse model, so that timm and transformers build it again."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from spot_vit.config.conversion import CONVERSIONS, conversion_of
from spot_vit.models.named import ANY, NAMED
from spot_vit.utils.modes import unwrap


def hub_config(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Name and arguments with which `timm.create_model` builds a sparse model again.

    Weights alone do not say how a model was converted, and the name of the dense model builds the
    dense model. With `spot_vit` imported, these read the model back as it is:

        timm.models.save_for_hf(model, folder, model_config=hub_config(model))
        timm.create_model(f"local-dir:{folder}", pretrained=True)

        wrapper.config.update(hub_config(wrapper.timm_model))  # TimmWrapper of transformers
        wrapper.save_pretrained(folder)

    Args:
        model: of timm, converted by `sparsify`, `sparsify_attention` or both; wrapped or not.
        **arguments: what `timm.create_model` was given besides the name; timm keeps it since
            1.0.31, so that nothing need be said here.

    Returns:
        "architecture" and "model_args", plain data; the number of classes is not among the
        arguments, as both libraries keep it apart.

    Raises:
        TypeError: the model is dense, was not made by `timm.create_model`, or misses an argument.
        ValueError: it was made by one of our names, and is converted otherwise than that says.
    """
    model = unwrap(model)
    conversion = conversion_of(model)
    if not conversion:
        raise TypeError(f"this {type(model).__name__} is dense; timm's own name builds it again")
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None:
        raise TypeError(f"timm.create_model did not make this {type(model).__name__}")
    if recorded := getattr(timm.models, "get_model_args", None):
        arguments = recorded(model, arguments)
    arguments.pop("num_classes", None)
    if name not in NAMED:
        if name != ANY:
            arguments["dense"] = name
        elif "dense" not in arguments:
            raise TypeError(f"say dense=..., the name that {ANY!r} was given: timm did not keep it")
        return {"architecture": ANY, "model_args": {**arguments, **conversion}}
    if any((f"{kind}_" in name) != (kind in conversion) for kind in CONVERSIONS):
        raise ValueError(
            f"the model was made as {name} and is converted otherwise: convert one of "
            f"timm.create_model({NAMED[name]!r}) instead"
        )
    fields = {field: value for kind in conversion.values() for field, value in kind.items()}
    return {"architecture": name, "model_args": {**arguments, **fields}}
