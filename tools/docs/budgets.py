"""Prints the table of docs/budgets.md: what SPOT-DeiT-S costs at each keep ratio.

python tools/docs/budgets.py [model]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import spot_vit  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402

RATIOS = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


def table(name: str = "deit_small_patch16_224") -> str:
    """Markdown, one row per ratio, with the shares of predictors and statistics in the total."""
    with torch.device("meta"):
        model = timm.create_model(name)
    size = model.default_cfg["input_size"]
    dense = spot_vit.count_flops(model, size).total
    spot_vit.sparsify(model)
    lines = [
        "| keep | patches after each stage | GMACs | of dense | predictors | statistics |",
        "|---|---|---|---|---|---|",
        f"| dense | | {dense / 1e9:.3f} | 100.0 % | | |",
    ]
    for ratio in RATIOS:
        count = spot_vit.count_flops(spot_vit.set_keep(model, ratio), size)
        kept = [count.layers[1 + b].tokens - model.num_prefix_tokens for b in model.spot_config.at]
        lines.append(
            f"| {ratio} | {', '.join(map(str, kept))} | {count.total / 1e9:.3f} | "
            f"{count.total / dense:.1%} | {count.predictor / 1e9:.3f} | "
            f"{count.statistics / 1e9:.3f} |".replace("%", " %")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*sys.argv[1:2]))
