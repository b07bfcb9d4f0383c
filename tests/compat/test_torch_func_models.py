"""torch.func, and second derivatives, on whole models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.chosen import ops_run
from support.models import images
from support.ranks import LEARNED, converted
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import spot_ext

each_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
each_kind = pytest.mark.parametrize("kind", LEARNED)
PLAIN_ATTENTION = SDPBackend.MATH  # torch's fast ones have first derivatives alone


def split(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters that are trained, and the others."""
    named = [(name, p.requires_grad, p.detach()) for name, p in model.named_parameters()]
    return {n: p for n, on, p in named if on}, {n: p for n, on, p in named if not on}


def loss_of(model: Any, trained: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, {**trained, **rest}, (x,)).square().sum()


def autograd(kind: str, training: bool, x: Tensor) -> dict[str, Tensor]:
    model = converted(kind).train(training)
    model(x).square().sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item()
        assert error <= 1e-10 * max(1.0, value.abs().max().item()), name


@each_mode
@each_kind
def test_grad_by_the_kernels(kind: str, training: bool):
    model = converted(kind).train(training)
    x, (trained, rest) = images(model), split(model)

    def function() -> dict[str, Tensor]:
        return grad(lambda p: loss_of(model, p, rest, x))(trained)

    assert_same(function(), autograd(kind, training, x))
    assert ops_run(function)


@each_mode
@each_kind
def test_gradients_of_every_sample(kind: str, training: bool):
    model = converted(kind).train(training)
    x, (trained, rest) = images(model), split(model)
    one = grad(lambda p, image: loss_of(model, p, rest, image[None]))
    found = vmap(one, in_dims=(None, 0))(trained, x)
    for i in range(len(x)):
        expected = autograd(kind, training, x[i : i + 1])
        assert_same({name: value[i] for name, value in found.items()}, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_mode
@each_kind
def test_jacobians_of_logits(kind: str, training: bool):
    model = converted(kind).train(training)
    x = images(model, 1)
    expected = torch.autograd.functional.jacobian(model, x)
    assert expected.abs().max() > 1e-6
    assert (jacrev(model)(x) - expected).abs().max() < 1e-12


@pytest.fixture
def plain_attention() -> Iterator[None]:
    with sdpa_kernel(PLAIN_ATTENTION):
        yield


@pytest.mark.usefixtures("plain_attention")
@each_mode
@each_kind
def test_forward_mode(kind: str, training: bool):
    model = converted(kind).train(training)
    x = images(model, 1)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x)
    expected = (torch.autograd.functional.jacobian(model, x) * along).sum(dim=(2, 3, 4, 5))
    assert (jvp(model, (x,), (along,))[1] - expected).abs().max() < 1e-10
    step = torch.zeros((), dtype=x.dtype)
    assert (jacfwd(lambda t: model(x + t * along))(step) - expected).abs().max() < 1e-10


@pytest.mark.usefixtures("plain_attention")
@each_mode
@each_kind
def test_second_derivatives(kind: str, training: bool):
    """Of a loss along a direction, backward and forward over backward.

    In eval also against differences of the gradient; straight-through gradients have none.
    """
    model = converted(kind).train(training)
    x = images(model, 1)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x)

    def gradient(image: Tensor, create_graph: bool = False) -> Tensor:
        leaf = image.detach().requires_grad_()
        loss = model(leaf).square().sum()
        (found,) = torch.autograd.grad(loss, leaf, create_graph=create_graph)
        return found if not create_graph else torch.autograd.grad((found * along).sum(), leaf)[0]

    step = 1e-5
    expected = (gradient(x + step * along) - gradient(x - step * along)) / (2 * step)
    with spot_ext.definitions():
        twice = gradient(x, create_graph=True)
    assert twice.abs().max() > 1e-6
    assert training or (twice - expected).abs().max() < 1e-5 * expected.abs().max()
    forward = jvp(grad(lambda image: model(image).square().sum()), (x,), (along,))[1]
    assert (forward - twice).abs().max() < 1e-10


@pytest.mark.usefixtures("plain_attention")
@pytest.mark.parametrize("kind", ["spot", "sparsifiner"])
def test_without_definitions_the_error_names_them(kind: str):
    model = converted(kind)
    x = images(model, 1).requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"spot_ext\.definitions\(\)"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_removal_says_how_vmap_draws(randomness: str):
    """Removal by chance draws numbers, which vmap has to be asked for."""
    model = converted("random").eval()
    x = images(model)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda image: model(image[None]))(x)
    torch.manual_seed(0)
    found = vmap(lambda image: model(image[None]), randomness=randomness)(x)
    assert found.shape == (3, 1, 7) and found.isfinite().all()
