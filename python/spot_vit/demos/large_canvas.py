"""A dense ViT for a large canvas of ClutteredDigits, trained on small windows of it first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

from spot_vit.data.digits import ClutteredDigits
from spot_vit.demos.setup import train_once
from spot_vit.training.fit import fit
from spot_vit.training.objectives import Objective, Parts

PATCH = 8


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of training.

    Attributes:
        canvas: side of the images, pixels; smaller than the model's is a window of it.
        fragments: pieces of clutter in an image.
        steps: of the optimizer.
        lr: peak rate; every phase warms up and decays to zero.
        ramp: share of the phase over which the clutter grows.
    """

    canvas: int
    fragments: int
    steps: int
    lr: float
    ramp: float = 0.0


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Sizes and rates of the dense model, found by trial (our choice).

    577 tokens and heads of 64: there attention is a good half of the arithmetic.
    """

    width: int = 128
    depth: int = 6
    heads: int = 2
    mlp_ratio: float = 2.0
    batch_size: int = 32
    weight_decay: float = 0.05
    phases: tuple[Phase, ...] = (
        Phase(64, 6, 1800, 1e-3, 0.4),
        Phase(128, 12, 150, 5e-4),
        Phase(192, 24, 100, 3e-4),
    )

    @property
    def size(self) -> int:
        """Side of the whole canvas, pixels."""
        return self.phases[-1].canvas

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return (1, self.size, self.size)

    def digits(
        self, split: str, length: int, phase: int = -1, seed: int = 0, ramp: bool = False
    ) -> ClutteredDigits:
        """Images as a phase has them, with or without its ramp; test images are of the last."""
        settings = self.phases[phase]
        return ClutteredDigits(
            split,
            length,
            canvas=settings.canvas,
            num_fragments=settings.fragments,
            patch_size=PATCH,
            ramp=int(settings.ramp * length) if ramp else 0,
            seed=seed,
        )


def build(canvas: Canvas) -> VisionTransformer:
    """Makes the dense model, for float32 images [B, 1, size, size].

    Positions start as sines and cosines: what a window teaches then holds elsewhere too.
    """
    model: Any = timm.create_model(
        "digits_vit",
        img_size=canvas.size,
        embed_dim=canvas.width,
        depth=canvas.depth,
        num_heads=canvas.heads,
        mlp_ratio=canvas.mlp_ratio,
    )
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.3 * _waves(canvas.size // PATCH, canvas.width)
    return model


def _waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, [side * side, width]."""
    rates = 100.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    rows, cols = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, cols], dim=2).flatten(0, 1)


class WindowObjective:
    """Cross-entropy on images that are windows of the canvas, somewhere else at every step.

    Args:
        seed: of the places.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        """The loss; the model is a `VisionTransformer` with a class token."""
        vit: Any = model
        positions, side = vit.pos_embed, images.shape[-1] // PATCH
        whole = vit.patch_embed.grid_size[0]
        room = whole - side + 1
        top, left = torch.randint(room, (2,), generator=self._generator).tolist()
        grid = positions[:, 1:].unflatten(1, (whole, whole))
        window = grid[:, top : top + side, left : left + side].flatten(1, 2)
        strict, vit.patch_embed.strict_img_size = vit.patch_embed.strict_img_size, False
        try:
            seen = {"pos_embed": torch.cat([positions[:, :1], window], dim=1)}
            logits = functional_call(vit, seen, (images,))
        finally:
            vit.patch_embed.strict_img_size = strict
        return F.cross_entropy(logits, target), {}


def in_bfloat16(objective: Objective) -> Objective:
    """The objective under autocast, where the processor multiplies tiles in bfloat16."""
    fast = torch.cpu._is_amx_tile_supported()

    def run(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss, parts = objective(model, images, target)
        return loss.float(), parts

    return run


def trained_dense(output: Path, canvas: Canvas, seed: int) -> nn.Module:
    """The dense model of a seed, trained phase by phase; phases found in `output` are read."""
    torch.manual_seed(seed)
    model = build(canvas)
    for k in range(len(canvas.phases)):
        name = f"dense-seed{seed}-phase{k}"
        so_far = dataclasses.replace(canvas, phases=canvas.phases[: k + 1])
        config = {"canvas": dataclasses.asdict(so_far), "size": canvas.size, "seed": seed}
        train_once(
            output / f"{name}.safetensors", model, config, _phase(model, canvas, k, seed, name)
        )
    return model.eval()


def _phase(
    model: nn.Module, canvas: Canvas, number: int, seed: int, name: str
) -> Callable[[], None]:
    def train() -> None:
        phase = canvas.phases[number]
        images = phase.steps * canvas.batch_size
        # No phase of any seed sees an image of another.
        data = canvas.digits("train", images, number, seed=100 * seed + number, ramp=True)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=phase.lr, weight_decay=canvas.weight_decay
        )
        fit(
            model,
            DataLoader(data, batch_size=canvas.batch_size),
            optimizer,
            in_bfloat16(WindowObjective(seed)),
            warmup=phase.steps // 10,
            clip_grad=1.0,
            name=name,
        )

    return train
