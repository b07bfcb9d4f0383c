"""Sparse models by name: `timm.create_model("spot_deit_small_patch16_224", keep=0.7)`.

Fields of `SpotConfig` go to `sparsify`, those of `SparsifinerConfig` to `sparsify_attention`,
everything else to the dense model of the name.
"""

from __future__ import annotations

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
NAMED |= {
    "sparsifiner_deit_small_patch16_224": "deit_small_patch16_224",
    "sparsifiner_lvvit_small": "lvvit_small",
    "spot_sparsifiner_deit_small_patch16_224": "deit_small_patch16_224",
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
        from spot_vit.config.sparsifiner import SparsifinerConfig
        from spot_vit.config.spot import SpotConfig
        from spot_vit.models.convert import sparsify
        from spot_vit.models.sparsifiner import sparsify_attention

        steps: list[tuple[Any, list[str]]] = []
        if "sparsifiner_" in name:
            steps.append((sparsify_attention, SparsifinerConfig.names()))
        if name.startswith("spot_"):
            steps.append((sparsify, SpotConfig.names()))
        if pretrained:
            calls = " and ".join(step.__name__ for step, _ in steps)
            raise RuntimeError(
                f"No pretrained weights exist for {name}. For those of the dense model under "
                f"untrained predictors: {calls} on timm.create_model({dense!r}, pretrained=True)"
            )
        given = [{f: kwargs.pop(f) for f in fields if f in kwargs} for _, fields in steps]
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or timm.get_pretrained_cfg(name)
        model = timm.create_model(dense, **kwargs)
        for (step, _), config in zip(steps, given, strict=True):
            step(model.model if kwargs.get("features_only") else model, **config)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Timm's `{dense}`, converted."
    return create


for _name, _dense in NAMED.items():
    globals()[_name] = register_model(_entrypoint(_name, _dense))
