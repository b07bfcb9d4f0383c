"""SPOT on timm Vision Transformers: sparse models, training and evaluation."""

try:
    import timm as _timm  # noqa: F401
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        "spot_vit needs timm; install it with: pip install 'spot-vit[models]'"
    ) from _missing

from spot_ext import __version__
from spot_vit.config import SpotConfig
from spot_vit.convert import UnsupportedModelError, restore, set_keep, sparsify, supported
from spot_vit.flops import count_flops
from spot_vit.loop import SpotOutput
from spot_vit.optim import param_groups

__all__ = [
    "SpotConfig",
    "SpotOutput",
    "UnsupportedModelError",
    "__version__",
    "count_flops",
    "param_groups",
    "restore",
    "set_keep",
    "sparsify",
    "supported",
]
