"""Tries every timm architecture and writes docs/backbones.md: what converts, what does not, why.

    python tools/docs/backbones.py [--run] [--check]

Structure is tried on the meta device, for all of timm. With --run each architecture that converts
is also run on random weights and a random image, and the outcome is added to
tools/docs/backbones.json, from which a later call goes on; models of more than 12 GB of
weights are left at their structure. With --check nothing is written; the exit status is 1 when the
page is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import spot_vit  # noqa: E402

PAGE = "docs/backbones.md"
RESULTS = "tools/docs/backbones.json"
LARGEST = 12e9  # bytes of weights that 16 GB of memory can run
OWN_SIZE = 250e6  # weights up to which a model runs at its own image size
SIDE = 8  # patches along the side of the images that larger models get
TOLERANCE = 1e-5  # of the largest output
SERIES = {  # by what stands in a name, the first that does
    "DINOv2": "dinov2",
    "DINOv3": "dinov3",
    "SigLIP": "siglip",
    "CLIP": "clip",
    "RADIO": "radio",
    "TIPS v2": "tipsv2",
    "Perception Encoder": "^vit_pe_",
    "AIMv2": "^aimv2",
    "BEiT": "^beit_",
    "BEiT v2": "^beitv2",
    "BEiT-3": "^beit3",
    "DeiT": "^deit_",
    "DeiT III": "^deit3",
    "EVA": "^eva_",
    "EVA-02": "^eva02",
    "FlexiViT": "^flexivit",
    "InternViT": "intern",
    "LingBot": "lingbot",
    "NaFlexViT": "^naflexvit",
    "Sapiens 2": "sapiens2",
    "ViTamin": "^vitamin",
    "ViT with rotary positions": "_rope_",
    "ViT on a convolutional stem": r"_r\d*_s\d|_resnet",
    "tests of timm": "^test_",
    "ViT": "",
}


ELSEWHERE = ROOT / "tools/docs/backbones_elsewhere.md"  # a part of the page, written by hand


@dataclasses.dataclass(frozen=True)
class Structure:
    """What conversion says to an architecture; `reason` is None where it converts."""

    name: str
    family: str
    reason: str | None
    parameters: int


def architectures() -> list[str]:
    """The names that timm knows without spot_vit."""
    own = "timm.models."
    return [
        x for x in timm.list_models() if timm.models.model_entrypoint(x).__module__.startswith(own)
    ]


def structure(name: str) -> Structure:
    """Builds the architecture on the meta device and tries to convert it."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    family = type(model).__name__
    parameters = sum(p.numel() for p in model.parameters())
    try:
        spot_vit.sparsify(model)
    except spot_vit.UnsupportedModelError as error:
        return Structure(name, family, _short(str(error)), parameters)
    return Structure(name, family, None, parameters)


def _short(reason: str) -> str:
    """Leaves out the number of the block and the list of what is supported."""
    what, _, rest = reason.removeprefix("cannot convert ").partition(": ")
    where = "" if what == "model" else "attention " if what.endswith("attn") else "block "
    told = rest.partition(". Supported here")[0].replace(f" (timm {timm.__version__})", "")
    return where + told


def series(name: str) -> str:
    """What an architecture belongs to, as far as its name says."""
    return next(label for label, part in SERIES.items() if re.search(part, name))


def _stem(model: Any) -> Any:
    return model.embeds if hasattr(model, "embeds") else model.patch_embed


def randomised(name: str) -> Any:
    """The architecture with random weights, made faster than its own initialisation makes them."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
        if sum(p.numel() for p in model.parameters()) > OWN_SIZE:
            size = [SIDE * ratio for ratio in _stem(model).feat_ratio(as_scalar=False)]
            model = timm.create_model(name, pretrained=False, img_size=size)
            model.pretrained_cfg["input_size"] = (3, *size)
    model = model.to_empty(device="cpu").eval()
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale, shift = (0.02, 0.0) if parameter.ndim > 1 else (0.1, float("norm" in key))
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), pool.numel()):
                piece = flat[start : start + pool.numel()]
                piece.copy_(pool[: piece.numel()]).mul_(scale).add_(shift)
    return model


@torch.inference_mode()
def numbers(name: str) -> float:
    """Runs the architecture dense and converted.

    Returns:
        The largest difference that the loop with statistics makes when nothing is cut, as a share
        of the largest output.

    Raises:
        AssertionError: at keep = 1.0 an output differs in any bit, or is not finite.
    """
    model = randomised(name)
    size = model.pretrained_cfg.get("input_size", (3, 224, 224))
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    assert expected.isfinite().all(), f"{name}: the dense model's output is not finite"
    spot_vit.sparsify(model, keep=1.0)
    assert torch.equal(model(x), expected), f"{name}: keep = 1.0 changes the output"
    out = model(x, aux=True)
    assert [mask.mean().item() for mask in out.masks] == [1.0] * len(out.masks), name
    return ((out.logits - expected).abs().max() / expected.abs().max()).item()


def page(found: Iterable[Structure], results: dict[str, float]) -> str:
    """The text of docs/backbones.md."""
    found = sorted(found, key=lambda s: s.name)
    good = [s for s in found if s.reason is None]
    flexible = [s for s in good if s.family == "NaFlexVit"]
    run = [s for s in good if s.name in results]
    worst = max((results[s.name] for s in run), default=0.0)
    families: dict[str, list[Structure]] = defaultdict(list)
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for s in found:
        if s.reason is None:
            families[s.family].append(s)
        else:
            reasons[s.family, s.reason].append(s.name)
    lines = [
        "# Backbones",
        "",
        f"Written by `python tools/docs/backbones.py` with timm {timm.__version__}; do not edit.",
        "",
        f"{len(good) - len(flexible)} of {len(found)} timm architectures convert, and "
        f"{len(flexible)} of NaFlexVit on top. {len(run)} of them were run with random weights in "
        f"eval, at their own image size (beyond {OWN_SIZE / 1e6:.0f} million weights on {SIDE} x "
        f"{SIDE} patches): at keep = 1.0 every output is bit for bit the dense model's, and "
        "the loop with statistics that cuts nothing differs by at most "
        f"{worst:.1e} of the largest output. The others (*) have more weights than 16 GB of memory "
        "can run, and are tried for their structure only.",
        "",
        "## They convert",
        "",
        "| class | architectures | of which, by name |",
        "|---|---|---|",
    ]
    for family, members in sorted(families.items()):
        counts = Counter(series(s.name) for s in members)
        covered = ", ".join(f"{label} ({counts[label]})" for label in SERIES if label in counts)
        lines.append(f"| {family} | {len(members)} | {covered} |")
    lines += ["", "<details>", "<summary>Their names</summary>", ""]
    for family, members in sorted(families.items()):
        listed = ", ".join(f"{s.name}{'' if s.name in results else ' (*)'}" for s in members)
        lines += [f"**{family}** ({len(members)}): {listed}", ""]
    lines += [
        "</details>",
        "",
        *ELSEWHERE.read_text().splitlines(),
        "",
        "## They are refused",
        "",
        "| class | what is told | architectures |",
        "|---|---|---|",
    ]
    for (family, reason), members in sorted(reasons.items()):
        some = ", ".join(members[:3]) + (f" and {len(members) - 3} more" * (len(members) > 3))
        lines.append(f"| {family} | {reason} | {some} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Tries, runs and writes what is asked; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run what converts and was not run yet")
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = [structure(name) for name in architectures()]
    recorded = ROOT / RESULTS
    results = json.loads(recorded.read_text()) if recorded.exists() else {}
    if arguments.run:
        for s in sorted(found, key=lambda s: s.parameters):
            if s.reason is None and s.name not in results and 4 * s.parameters < LARGEST:
                results[s.name] = numbers(s.name)
                print(f"{s.name}: {results[s.name]:.1e}", flush=True)
                assert results[s.name] <= TOLERANCE, s.name
                recorded.write_text(json.dumps(results, indent=1) + "\n")
    text, path = page(found, results), ROOT / PAGE
    if arguments.check:
        return int(path.read_text() != text)
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
