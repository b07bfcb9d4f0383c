"""Sparse models by name: `timm.create_model("spot_deit_small_patch16_224", keep=0.7)`.

Fields of `SpotConfig` go to `sparsify`, those of `SparsifinerConfig` to `sparsify_attention`,
everything else to the dense model of the name. `pretrained=True` loads weights of one's own from
where `pretrained_cfg` or its overlay says, as for every model of timm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg

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

__all__ = ["ANY", "NAMED"]


ANY = "spot_vit"
"""Our name for any dense model: `timm.create_model(ANY, dense="vit_tiny_patch16_224", spot={})`."""


def spot_vit(
    pretrained: bool = False,
    *,
    dense: str,
    spot: Mapping[str, Any] | None = None,
    sparsifiner: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Any timm model that can be converted, converted; what Hub folders of sparse models name.

    Args:
        pretrained: load weights; `pretrained_cfg` or its overlay says from where.
        dense: timm's name of the model.
        spot: fields of `SpotConfig`, `{}` for the default ones; None leaves the tokens alone.
        sparsifiner: fields of `SparsifinerConfig` likewise; None leaves attention alone.
        **kwargs: of the dense model.
    """
    given = {"sparsifiner": sparsifiner, "spot": spot}
    conversion = {kind: fields for kind, fields in given.items() if fields is not None}
    if not conversion:
        raise ValueError(f"{ANY} needs spot={{...}} or sparsifiner={{...}}, else it is {dense!r}")
    if not kwargs.get("pretrained_cfg"):
        found = timm.get_pretrained_cfg(dense)
        cfg = {} if found is None else found.to_dict(remove_source=True)
        kwargs["pretrained_cfg"] = {**cfg, "architecture": ANY}
    return _build(ANY, dense, conversion, pretrained, kwargs)


def _entrypoint(name: str, dense: str) -> Callable[..., Any]:
    kinds = [kind for kind in ("sparsifiner", "spot") if f"{kind}_" in name]

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        from spot_vit.config.conversion import CONVERSIONS

        fields = {kind: CONVERSIONS[kind].config.names() for kind in kinds}
        conversion = {k: {f: kwargs.pop(f) for f in fields[k] if f in kwargs} for k in kinds}
        return _build(name, dense, conversion, pretrained, kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Timm's `{dense}`, converted."
    return create


def _build(
    name: str,
    dense: str,
    conversion: Mapping[str, Mapping[str, Any]],
    pretrained: bool,
    kwargs: dict[str, Any],
) -> Any:
    """The dense model, converted; timm loads weights of its own part, we those of predictors."""
    # Imported when a model is made: these modules import timm, which imports this one.
    from spot_vit.config.conversion import CONVERSIONS
    from spot_vit.models import own_weights
    from spot_vit.models.convert import convert_as

    cfg = resolve_pretrained_cfg(
        name, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    ).to_dict()
    weights = None
    if pretrained:
        if not own_weights.has_source(cfg):
            words = " and ".join(CONVERSIONS[kind].call for kind in conversion)
            raise RuntimeError(
                f"No pretrained weights exist for {name}. For your own: pretrained_cfg_overlay="
                f"dict(file=...). For those of the dense model under untrained predictors: {words} "
                f"on timm.create_model({dense!r}, pretrained=True)"
            )
        weights = own_weights.read_own(cfg, kwargs.get("cache_dir"))
    made_from = cfg if weights is None else own_weights.dense_cfg(cfg, weights)
    model = timm.create_model(
        dense, pretrained=weights is not None, pretrained_cfg=made_from, **kwargs
    )
    own_weights.forget_weights(model, cfg)
    inner = model.model if kwargs.get("features_only") else model
    convert_as(inner, conversion)
    if weights is not None:
        own_weights.load_predictors(inner, weights)
    return model


register_model(spot_vit)
for _name, _dense in NAMED.items():
    globals()[_name] = register_model(_entrypoint(_name, _dense))
