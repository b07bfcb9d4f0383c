"""SPOT on timm Vision Transformers: sparse models, training and evaluation.

Names are imported when first used: the command `spot` starts without torch and timm, and can say
which of them is missing. The named models are registered with timm in whichever order the two are
imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spot_vit._register import register_with_timm
from spot_vit.utils.requirements import timm_trouble

if TYPE_CHECKING:
    from spot_ext import __version__
    from spot_vit.config.recipe import Recipe
    from spot_vit.config.sparsifiner import SparsifinerConfig
    from spot_vit.config.spot import SpotConfig
    from spot_vit.data.corruptions import CorruptedDigits
    from spot_vit.data.digits import ClutteredDigits
    from spot_vit.evaluation.accuracy import evaluate
    from spot_vit.evaluation.foreground import foreground_kept
    from spot_vit.evaluation.pictures import save_kept
    from spot_vit.evaluation.statistics import paired_difference
    from spot_vit.export.make import export_model
    from spot_vit.export.opened import open_exported
    from spot_vit.measure.attention_flops import mhsa_flops
    from spot_vit.measure.flops import count_flops
    from spot_vit.measure.latency import compare_latency, compare_training
    from spot_vit.models.adapters.find import UnsupportedModelError
    from spot_vit.models.convert import restore, set_keep, sparsify, supported
    from spot_vit.models.fast import fast
    from spot_vit.models.hub import hub_config
    from spot_vit.models.loop import SpotOutput
    from spot_vit.models.published import convert_checkpoint
    from spot_vit.models.recording import attention_maps, record_operands
    from spot_vit.models.saved import load, save
    from spot_vit.models.sparsifiner import dense_attention, set_grid, sparsify_attention
    from spot_vit.models.token_pass import TokenPass
    from spot_vit.nn.exit_lens import ExitLens
    from spot_vit.nn.operands import AttentionMap
    from spot_vit.report.show import show
    from spot_vit.report.trace import Trace
    from spot_vit.report.tracing import trace
    from spot_vit.runs.train import train
    from spot_vit.training.checkpoint import load_checkpoint, save_checkpoint
    from spot_vit.training.connectivity_init import start_from_regions
    from spot_vit.training.fit import fit
    from spot_vit.training.keep_sampling import SampledKeep
    from spot_vit.training.losses import (
        LossWeights,
        Teacher,
        feature_distillation,
        sigmoid_distillation,
        softmax_distillation,
        spot_loss,
    )
    from spot_vit.training.objectives import SpotObjective, dense_objective
    from spot_vit.training.param_groups import param_groups
    from spot_vit.training.reconstruction import attention_seen
    from spot_vit.training.schedules import KeepSchedule, NoiseSchedule
    from spot_vit.training.sparsifiner import (
        SparsifinerObjective,
        finetune,
        learn_connectivity,
        train_connectivity,
    )
    from spot_vit.utils.errors import UserError

_HOME = {
    "AttentionMap": "spot_vit.nn.operands",
    "ClutteredDigits": "spot_vit.data.digits",
    "CorruptedDigits": "spot_vit.data.corruptions",
    "ExitLens": "spot_vit.nn.exit_lens",
    "KeepSchedule": "spot_vit.training.schedules",
    "LossWeights": "spot_vit.training.losses",
    "NoiseSchedule": "spot_vit.training.schedules",
    "Recipe": "spot_vit.config.recipe",
    "SampledKeep": "spot_vit.training.keep_sampling",
    "SparsifinerConfig": "spot_vit.config.sparsifiner",
    "SparsifinerObjective": "spot_vit.training.sparsifiner",
    "SpotConfig": "spot_vit.config.spot",
    "SpotObjective": "spot_vit.training.objectives",
    "SpotOutput": "spot_vit.models.loop",
    "Teacher": "spot_vit.training.losses",
    "TokenPass": "spot_vit.models.token_pass",
    "Trace": "spot_vit.report.trace",
    "UnsupportedModelError": "spot_vit.models.adapters.find",
    "UserError": "spot_vit.utils.errors",
    "__version__": "spot_ext",
    "attention_maps": "spot_vit.models.recording",
    "attention_seen": "spot_vit.training.reconstruction",
    "compare_latency": "spot_vit.measure.latency",
    "compare_training": "spot_vit.measure.latency",
    "convert_checkpoint": "spot_vit.models.published",
    "count_flops": "spot_vit.measure.flops",
    "dense_attention": "spot_vit.models.sparsifiner",
    "dense_objective": "spot_vit.training.objectives",
    "evaluate": "spot_vit.evaluation.accuracy",
    "export_model": "spot_vit.export.make",
    "fast": "spot_vit.models.fast",
    "feature_distillation": "spot_vit.training.losses",
    "finetune": "spot_vit.training.sparsifiner",
    "fit": "spot_vit.training.fit",
    "foreground_kept": "spot_vit.evaluation.foreground",
    "hub_config": "spot_vit.models.hub",
    "learn_connectivity": "spot_vit.training.sparsifiner",
    "load": "spot_vit.models.saved",
    "load_checkpoint": "spot_vit.training.checkpoint",
    "mhsa_flops": "spot_vit.measure.attention_flops",
    "open_exported": "spot_vit.export.opened",
    "paired_difference": "spot_vit.evaluation.statistics",
    "param_groups": "spot_vit.training.param_groups",
    "record_operands": "spot_vit.models.recording",
    "restore": "spot_vit.models.convert",
    "save": "spot_vit.models.saved",
    "save_checkpoint": "spot_vit.training.checkpoint",
    "save_kept": "spot_vit.evaluation.pictures",
    "set_grid": "spot_vit.models.sparsifiner",
    "set_keep": "spot_vit.models.convert",
    "show": "spot_vit.report.show",
    "sigmoid_distillation": "spot_vit.training.losses",
    "softmax_distillation": "spot_vit.training.losses",
    "sparsify": "spot_vit.models.convert",
    "sparsify_attention": "spot_vit.models.sparsifiner",
    "spot_loss": "spot_vit.training.losses",
    "start_from_regions": "spot_vit.training.connectivity_init",
    "supported": "spot_vit.models.convert",
    "trace": "spot_vit.report.tracing",
    "train": "spot_vit.runs.train",
    "train_connectivity": "spot_vit.training.sparsifiner",
}
"""The public names, and the module that each comes from."""

__all__ = [
    "AttentionMap",
    "ClutteredDigits",
    "CorruptedDigits",
    "ExitLens",
    "KeepSchedule",
    "LossWeights",
    "NoiseSchedule",
    "Recipe",
    "SampledKeep",
    "SparsifinerConfig",
    "SparsifinerObjective",
    "SpotConfig",
    "SpotObjective",
    "SpotOutput",
    "Teacher",
    "TokenPass",
    "Trace",
    "UnsupportedModelError",
    "UserError",
    "__version__",
    "attention_maps",
    "attention_seen",
    "compare_latency",
    "compare_training",
    "convert_checkpoint",
    "count_flops",
    "dense_attention",
    "dense_objective",
    "evaluate",
    "export_model",
    "fast",
    "feature_distillation",
    "finetune",
    "fit",
    "foreground_kept",
    "hub_config",
    "learn_connectivity",
    "load",
    "load_checkpoint",
    "mhsa_flops",
    "open_exported",
    "paired_difference",
    "param_groups",
    "record_operands",
    "restore",
    "save",
    "save_checkpoint",
    "save_kept",
    "set_grid",
    "set_keep",
    "show",
    "sigmoid_distillation",
    "softmax_distillation",
    "sparsify",
    "sparsify_attention",
    "spot_loss",
    "start_from_regions",
    "supported",
    "trace",
    "train",
    "train_connectivity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spot_vit' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ImportError as cause:
        if (words := timm_trouble(cause)) is None:
            raise
        raise type(cause)(words, name=cause.name) from cause


def __dir__() -> list[str]:
    return __all__


register_with_timm()
