"""Wrappers that training scripts put around a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


class Peft(nn.Module):
    """Holds a model as `peft.PeftModel` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})
        self.peft_config = model.peft_config = {"default": None}  # PEFT marks the model inside too

    def get_base_model(self) -> nn.Module:
        return self.base_model["model"]

    def forward(self, *args: Any, **arguments: Any) -> Any:
        return self.get_base_model()(*args, **arguments)


WRAPPERS = ("none", "compiled", "DDP", "DataParallel", "EMA", "PEFT")


@contextmanager
def wrapped(model: nn.Module, kind: str) -> Iterator[Any]:
    """The model in a wrapper; DDP in a group of one process."""
    if kind == "DDP":
        with tempfile.TemporaryDirectory() as folder:
            store = f"file://{Path(folder) / 'store'}"
            distributed.init_process_group("gloo", store, rank=0, world_size=1)
            try:
                yield DistributedDataParallel(model, find_unused_parameters=True)
            finally:
                distributed.destroy_process_group()
        return
    yield {
        "none": lambda: model,
        "compiled": lambda: torch.compile(model, backend="eager"),
        "DataParallel": lambda: nn.DataParallel(model),
        "EMA": lambda: ModelEmaV3(model),
        "PEFT": lambda: Peft(model),
    }[kind]()
