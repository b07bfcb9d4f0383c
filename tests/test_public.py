"""The public names of `spot_vit`: pinned, each where it says, and the only ones that pages use."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import spot_vit

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
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
}


def test_public_names() -> None:
    """A name that goes, or gets another meaning, breaks someone's script: see UPGRADING.md."""
    assert set(spot_vit.__all__) == PUBLIC == set(spot_vit._HOME) == set(dir(spot_vit))
    for name, home in spot_vit._HOME.items():
        found = getattr(spot_vit, name)
        assert found is getattr(importlib.import_module(home), name)
        assert name == "__version__" or (found.__module__ == home and found.__doc__), name


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "python/spot_vit/__init__.py").read_text())
    shown = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {a.name: n.module for n in shown.body for a in n.names}  # type: ignore[attr-defined]
    assert homes == spot_vit._HOME


def test_pages_for_users_name_what_is_public() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    for page in pages:
        if page.name.startswith(("adding_", "design", "CONTRIBUTING")):
            continue  # for those who work on the library
        text = page.read_text().replace("spot_vit.json", "")  # a file's name
        named = set(re.findall(r"\bspot_vit\.(\w+)", text))
        assert named <= PUBLIC | {"__all__"}, f"{page.name}: {named - PUBLIC}"
