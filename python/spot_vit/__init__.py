"""SPOT on timm Vision Transformers: sparse models, training and evaluation.

Names are imported when first used: the command `spot` starts without torch and timm, and can say
which of them is missing. The named models are registered with timm in whichever order the two are
imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spot_vit._register import register_with_timm

if TYPE_CHECKING:
    from spot_ext import __version__
    from spot_vit.adapters.find import UnsupportedModelError
    from spot_vit.checkpoints import convert_checkpoint
    from spot_vit.config import SpotConfig
    from spot_vit.convert import restore, set_keep, sparsify, supported
    from spot_vit.flops import count_flops
    from spot_vit.loop import SpotOutput
    from spot_vit.optim import param_groups
    from spot_vit.sampling import SampledKeep
    from spot_vit.sparsifiner import sparsify_attention
    from spot_vit.sparsifiner_config import SparsifinerConfig

_HOME = {
    "SampledKeep": "spot_vit.sampling",
    "SparsifinerConfig": "spot_vit.sparsifiner_config",
    "SpotConfig": "spot_vit.config",
    "SpotOutput": "spot_vit.loop",
    "UnsupportedModelError": "spot_vit.adapters.find",
    "__version__": "spot_ext",
    "convert_checkpoint": "spot_vit.checkpoints",
    "count_flops": "spot_vit.flops",
    "param_groups": "spot_vit.optim",
    "restore": "spot_vit.convert",
    "set_keep": "spot_vit.convert",
    "sparsify": "spot_vit.convert",
    "sparsify_attention": "spot_vit.sparsifiner",
    "supported": "spot_vit.convert",
}

__all__ = [
    "SampledKeep",
    "SparsifinerConfig",
    "SpotConfig",
    "SpotOutput",
    "UnsupportedModelError",
    "__version__",
    "convert_checkpoint",
    "count_flops",
    "param_groups",
    "restore",
    "set_keep",
    "sparsify",
    "sparsify_attention",
    "supported",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spot_vit' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as missing:
        if missing.name == "timm":
            raise ModuleNotFoundError(
                "spot_vit needs timm; install it with: pip install 'spot-vit[models]'", name="timm"
            ) from missing
        raise


def __dir__() -> list[str]:
    return __all__


register_with_timm()
