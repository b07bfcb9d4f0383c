"""Exported files as models: for evaluation, and beside the models they were made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spot_vit.export.standalone import Missing, NotOurs, load
from spot_vit.utils.errors import UserError


class Exported(nn.Module):
    """An exported file as a module: on the CPU, in eval mode, without parameters.

    Attributes:
        path: of the file.
        format: "torch", "aoti", "onnx" or "openvino".
        metadata: what the file says of itself: "architecture", "keep", "conversion", "classes",
            "data_config", "gmacs", "inputs", "outputs", "operators", "opset", "needs", "versions".
        num_classes: number of logits.
        gmacs: billions of multiply-accumulates per image, counted of the model; or None.
        pretrained_cfg: preprocessing and names of the classes, where timm looks for them.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__()
        try:
            self._run, self.metadata = load(path, threads)
        except (NotOurs, Missing) as error:
            raise UserError(str(error)) from error
        self.path = path
        self.format: str = self.metadata["format"]
        self.num_classes: int = self.metadata["outputs"]["logits"][-1]
        self.gmacs: float | None = self.metadata["gmacs"]
        self.pretrained_cfg: dict[str, Any] = {
            **self.metadata["data_config"],
            "architecture": self.metadata["architecture"],
            "num_classes": self.num_classes,
            "label_names": self.metadata["classes"],
        }
        self.default_cfg = self.pretrained_cfg
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] float32, on the device of the images; computed on the CPU.

        Args:
            images: [B, 3, H, W], H and W as the file was made for.
        """
        return self.decisions(images)[0].to(images.device)

    def decisions(self, images: Tensor) -> list[Tensor]:
        """Logits, then for each decision [B, n] int64 ascending positions of what stays.

        Raises:
            ValueError: the images are of another size.
            NotImplementedError: they are on the meta device, which computes nothing.
        """
        wanted = self.metadata["inputs"]["images"][1:]
        if images.dim() != 4 or list(images.shape[1:]) != wanted:
            raise ValueError(f"expected images [B, {wanted}], got {list(images.shape)}")
        found = self._run(images.detach().to("cpu", torch.float32).contiguous().numpy())
        return [torch.from_numpy(output) for output in found]

    def train(self, mode: bool = True) -> Exported:
        """Stays in eval mode, and refuses another."""
        if mode:
            raise UserError(f"{self.path} was exported for inference, and cannot be trained")
        return super().train(False)


def open_exported(path: str | os.PathLike[str], threads: int | None = None) -> Exported:
    """Opens a file of `spot export` as a module that gives logits.

    Args:
        path: of the file; OpenVINO's is the .xml.
        threads: of the CPU; None: as many as torch has now. Files of torch follow torch's own.

    Raises:
        UserError: there is no such file, it was not written by `spot export`, or what it needs is
            not installed.
    """
    return Exported(Path(path), torch.get_num_threads() if threads is None else threads)
