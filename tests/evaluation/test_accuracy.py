"""Accuracy of a model."""

from __future__ import annotations

import pytest
import torch
from spot_vit.evaluation.accuracy import evaluate
from spot_vit.utils.modes import eval_mode
from support.training import make_loader, make_model
from torch import nn


def test_evaluate_counts_in_order_and_restores_every_mode() -> None:
    model, loader = make_model(), make_loader(50)
    model.train()
    model[1].eval()
    result = evaluate(model, loader)
    assert [module.training for module in model] == [True, False, True, True]
    inputs, target = loader.dataset.tensors  # type: ignore[attr-defined]
    with eval_mode(model), torch.no_grad():
        logits = model(inputs)
    assert torch.equal(result.correct, logits.argmax(1) == target)
    assert result.top1 == pytest.approx(result.correct.float().mean().item())
    loss = nn.functional.cross_entropy(logits, target).item()
    assert result.loss == pytest.approx(loss, rel=1e-5)
