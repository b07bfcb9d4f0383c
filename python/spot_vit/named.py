"""SPOT models by name: `timm.create_model("spot_deit_small_patch16_224", keep=0.7)`.

Fields of `SpotConfig` go to `sparsify`, everything else to the dense model of the name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

NAMED = {
    f"spot_{name}": name
    for name in (
        "deit_tiny_patch16_224",
        "deit_small_patch16_224",
        "deit_base_patch16_224",
        "lvvit_tiny",
        "lvvit_small",
        "lvvit_medium",
    )
}
"""Our names and the dense models they are made from."""


def _cfg(dense: str) -> dict[str, Any]:
    lvvit = dense.startswith("lvvit")
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0 if dense == "lvvit_medium" else 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1" if lvvit else "patch_embed.proj",
        "classifier": ("head", "aux_head") if lvvit else "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({name: _cfg(dense) for name, dense in NAMED.items()})

__all__ = ["NAMED"]


def _entrypoint(name: str, dense: str) -> Callable[..., Any]:
    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        # Imported when a model is made: these modules import timm, which imports this one.
        from spot_vit.config import SpotConfig
        from spot_vit.convert import sparsify

        if pretrained:
            raise RuntimeError(
                f"No pretrained weights exist for {name}. For those of the dense model under "
                f"untrained predictors: sparsify(timm.create_model({dense!r}, pretrained=True))"
            )
        fields = {field.name for field in dataclasses.fields(SpotConfig)} & set(kwargs)
        config = {field: kwargs.pop(field) for field in fields}
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or timm.get_pretrained_cfg(name)
        return sparsify(timm.create_model(dense, **kwargs), **config)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`sparsify` of timm's `{dense}`."
    return create


for _name, _dense in NAMED.items():
    globals()[_name] = register_model(_entrypoint(_name, _dense))
