"""Prints the table of docs/sparsifiner.md: what attention costs at each keep rate.

python tools/docs/attention_flops.py [model ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import spot_vit  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from spot_vit.measure.attention_flops import mhsa_flops  # noqa: E402

MODELS = ("deit_small_patch16_224", "lvvit_small", "lvvit_medium")
RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.1, 0.05, 0.01)


def costs(name: str) -> dict[float, float]:
    """MHSA MMACs by keep rate; 1.0 is dense."""
    with torch.device("meta"):
        model = timm.create_model(name)
    size = model.default_cfg["input_size"]
    spot_vit.sparsify_attention(model, 1.0)
    found = {}
    for rate in (1.0, *RATES):
        found[rate] = mhsa_flops(spot_vit.set_keep(model, attention=rate), size).total / 1e6
    return found


def table(names: tuple[str, ...] = MODELS) -> str:
    """Markdown, one row per keep rate and one column per model."""
    columns = [costs(name) for name in names]
    lines = [f"| keep rate | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for rate in (1.0, *RATES):
        values = " | ".join(f"{column[rate]:.2f}" for column in columns)
        lines.append(f"| {'dense' if rate == 1 else rate} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(tuple(sys.argv[1:]) or MODELS))
