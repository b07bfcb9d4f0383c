"""A small model, its data and its optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 2))


def make_loader(batch: int = 16) -> DataLoader[tuple[Tensor, ...]]:
    """Two classes, told apart by the sign of one input."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 4, generator=draw)
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=batch)


def make_optimizer(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)
