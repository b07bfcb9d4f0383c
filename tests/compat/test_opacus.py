"""Gradients of every sample by Opacus, and private training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import images
from support.ranks import LEARNED, converted
from torch.utils.data import DataLoader, TensorDataset

opacus = pytest.importorskip("opacus")

pytestmark = pytest.mark.filterwarnings("ignore")  # Opacus and torch's hooks have their own


@pytest.mark.parametrize("kind", LEARNED)
def test_gradients_of_samples_are_those_of_one_at_a_time(kind: str):
    model = converted(kind)
    x = images(model)
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    wrapped(x).square().sum().backward()
    found = {n: p.grad_sample for n, p in model.named_parameters() if p.requires_grad}
    one = converted(kind)
    for i in range(len(x)):
        one.zero_grad()
        one(x[i : i + 1]).square().sum().backward()
        for name, parameter in one.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                error = (found[name][i] - grad).abs().max()
                assert error <= 1e-9 * max(1.0, grad.abs().max().item()), (name, i)


@pytest.mark.parametrize("kind", LEARNED)
def test_private_training(kind: str):
    torch.manual_seed(0)
    model: Any = converted(kind).float()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data = TensorDataset(images(model, 4), torch.tensor([0, 1, 2, 3]))
    model, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(data, batch_size=4),
        noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for x, target in loader:
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
