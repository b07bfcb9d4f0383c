"""Whether whole models give bit for bit what another revision gives: logits, loss, gradients.

    python tools/release/same_results.py REVISION

Runs converted models with the code of REVISION and with that of this checkout, on the libraries
that are installed: in eval at two budgets, and one training step each. Public names alone are used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"img_size": 64, "embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 7}
SMALL_PATCHES = {**SIZES, "img_size": 56}
VIT = "vit_tiny_patch16_224"
SPARSE = {"keep_rate": 0.4, "reduce_n": 2, "backend": "sparse"}
GROUPED = {"num_heads": 4, "num_kv_heads": 2, "rope_type": "axial", "attn_type": "rope"}

Case = tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]

CASES: dict[str, Case] = {  # timm name and its arguments, those of sparsify, of sparsify_attention
    "SPOT": (VIT, SIZES, {}, None),
    "gumbel, raw, heads averaged": (VIT, SIZES, {"scaling": "raw", "heads": "mean"}, None),
    "exact budget, short history": (
        VIT, SIZES, {"train_decision": "topk", "history": "since_last"}, None,
    ),
    "detached, fused": (VIT, SIZES, {"detach_stats": True, "soft": "fuse"}, None),
    "average pooling": (VIT, {**SIZES, "global_pool": "avg"}, {"features": ["embed", "cls"]}, None),
    "DynamicViT": (VIT, SIZES, {"method": "dynamicvit"}, None),
    "EViT": (VIT, SIZES, {"method": "evit"}, None),
    "random": (VIT, SIZES, {"method": "random"}, None),
    "DeiT-III": ("deit3_small_patch16_224", SIZES, {}, None),
    "distilled": ("deit_tiny_distilled_patch16_224", SIZES, {}, None),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", SMALL_PATCHES, {}, None),
    "SigLIP": ("vit_base_patch16_siglip_224", SIZES, {}, None),
    "CLIP": ("vit_base_patch16_clip_224", SIZES, {}, None),
    "EVA-02": ("eva02_tiny_patch14_224", SMALL_PATCHES, {}, None),
    "DINOv3": ("vit_small_patch16_dinov3", SIZES, {"soft": "fuse"}, None),
    "rotary tables per block": ("vit_small_patch16_rope_mixed_224", SIZES, {}, None),
    "BEiT": ("beit_base_patch16_224", SIZES, {}, None),
    "NaFlex, grouped queries": (
        "naflexvit_base_patch16_gap", {**SIZES, **GROUPED, "qkv_fused": False}, {}, None,
    ),
    "LV-ViT": ("lvvit_tiny", SIZES, {}, None),
    "Sparsifiner": (VIT, SIZES, None, SPARSE),
    "Sparsifiner, masked": (VIT, SIZES, None, {**SPARSE, "backend": "dense"}),
    "SPOT with Sparsifiner": (VIT, SIZES, {}, SPARSE),
}  # fmt: skip
KEEPS = (0.7, 0.5)


def results() -> dict[str, Tensor]:
    """Everything that is compared, by case and name."""
    found: dict[str, Tensor] = {}
    torch.set_num_threads(2)
    for name, case in CASES.items():
        for what, value in _of_case(*case).items():
            found[f"{name}: {what}"] = value
    return found


def _of_case(
    architecture: str,
    arguments: dict[str, Any],
    spot: dict[str, Any] | None,
    attention: dict[str, Any] | None,
) -> dict[str, Tensor]:
    import spot_vit
    import timm

    torch.manual_seed(0)
    dense = _weighted(timm.create_model(architecture, **arguments))
    model = _weighted(timm.create_model(architecture, **arguments))
    if attention is not None:
        spot_vit.sparsify_attention(model, **attention)
    if spot is not None:
        spot_vit.sparsify(model, keep=KEEPS[0], at=[1, 2, 3], **spot)
    side = arguments["img_size"]
    images = torch.randn(3, 3, side, side)
    labels = torch.randint(arguments["num_classes"], (3,))
    found: dict[str, Tensor] = {}
    model.eval()
    for keep in KEEPS:
        budget = {} if attention is None else {"attention": 0.5 * keep}
        budget |= {} if spot is None else {"tokens": keep}
        spot_vit.set_keep(model, **budget)
        torch.manual_seed(1)
        with torch.no_grad():
            found[f"logits at {keep}"] = model(images)
            found[f"tokens at {keep}"] = model.forward_features(images)
    model.train()
    torch.manual_seed(2)
    if spot is None:
        loss = nn.functional.cross_entropy(model(images), labels)
    else:
        ratios = model.spot_config.keep_ratios()
        loss, parts = spot_vit.SpotObjective(ratios, teacher=dense)(model, images, labels)
        terms = {part: value for part, value in parts.items() if part != "noise_share"}  # no term
        found |= {f"loss {part}": value for part, value in terms.items()}
    loss.backward()
    found["loss"] = loss.detach()
    for parameter, value in model.named_parameters():
        if value.grad is not None:
            found[f"gradient of {parameter}"] = value.grad
    return found


def _weighted(model: nn.Module) -> nn.Module:
    """The model with weights large enough that every part matters."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    return model


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of what is missing on one side, or not the same bits."""
    names = sorted(set(ours) | set(theirs))
    return [
        name
        for name in names
        if name not in ours or name not in theirs or not _same(ours[name], theirs[name])
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        *(torch.atleast_1d(x).contiguous().view(torch.uint8) for x in (one, other))
    )


def _run(checkout: Path, output: Path) -> dict[str, Tensor]:
    """The results of the code in `checkout`, in a process of its own."""
    path = os.pathsep.join([str(checkout / "python"), str(checkout)])
    command = [sys.executable, __file__, "--write", str(output)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    return torch.load(output, weights_only=True)


def main() -> int:
    """Prints how many tensors were compared; exit status 1 when any differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("revision", nargs="?", help="what to compare with, as git names it")
    kind.add_argument("--write", type=Path, help="only run, and write the results to a file")
    arguments = parser.parse_args()
    if arguments.write:
        torch.save(results(), arguments.write)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(other), arguments.revision], check=True)
        try:
            theirs = _run(other, Path(folder) / "theirs.pt")
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
        ours = _run(ROOT, Path(folder) / "ours.pt")
    differ = differences(ours, theirs)
    for name in differ:
        print(f"differs: {name}")
    print(f"{len(CASES)} models, {len(ours)} tensors, {len(differ)} differ")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
