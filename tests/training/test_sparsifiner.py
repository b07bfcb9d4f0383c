"""Training of Sparsifiner: the loss by its definition, who learns in which stage, memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.models.recording import record_operands
from spot_vit.models.sparsifiner import dense_attention, predictors
from spot_vit.nn.operands import Operands
from spot_vit.training.connectivity_init import _regions, start_from_regions
from spot_vit.training.reconstruction import attention_seen, reconstruction_loss
from spot_vit.training.sparsifiner import (
    ReconstructionObjective,
    SparsifinerObjective,
    finetune,
    learn_connectivity,
    train_connectivity,
    training_of,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

B, H, N = 3, 2, 17


def make(size: int = 32, **connectivity: Any) -> tuple[Any, Any]:
    """A model with sparse attention and the dense model it came from."""
    torch.manual_seed(0)
    dense = VisionTransformer(
        img_size=size, patch_size=8, in_chans=1, num_classes=5, embed_dim=32, depth=2, num_heads=H
    ).eval()
    for parameter in dense.parameters():  # random weights everywhere, biases too
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model = spot_vit.sparsify_attention(copy.deepcopy(dense), 0.25, **connectivity)
    return learn_connectivity(model), dense


def data(count: int = B, size: int = 32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 1, size, size), torch.randint(5, (count,))


def operands(model: Any, images: Tensor) -> dict[int, Operands]:
    with torch.no_grad(), dense_attention(model), record_operands(model) as found:
        model(images)
    return found


def by_definition(model: Any, student: dict[int, Operands], teacher: dict[int, Operands]) -> Tensor:
    """METHOD's formulas, with the whole map at once."""
    losses = []
    for b, p in predictors(model).items():
        q = student[b].q.transpose(1, 2)[:, :, 1:] @ p.proj_c_q.weight.mT + p.proj_c_q.bias
        k = student[b].k.transpose(1, 2) @ p.proj_c_k.weight.mT + p.proj_c_k.bias
        coefficients = (q @ (k.mT @ p.proj_n) * H**-0.5).softmax(dim=-1)
        logits = teacher[b].q.transpose(1, 2) @ teacher[b].k.transpose(1, 2).mT
        attention = (logits * teacher[b].scale).softmax(dim=-1)[:, :, 1:]
        losses.append(((coefficients @ p.proj_back_n.mT - attention) ** 2).sum())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tile", [1, 5, 16, 100])
def test_reconstruction_and_its_gradients_equal_the_definition(tile: int) -> None:
    model, dense = (m.double() for m in make())
    images = data()[0].double()
    student, teacher = operands(model, images), operands(dense, 2 * images)
    weights = [p for predictor in predictors(model).values() for p in predictor.parameters()]
    expected = by_definition(model, student, teacher)
    found = reconstruction_loss(predictors(model), student, teacher, tile)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7 * theirs.abs().max().item())


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("tile", [16, 256])
def test_no_tensor_of_tokens_times_tokens_is_alive(tile: int) -> None:
    model, _ = make(128)
    images, target = data(1, 128)
    tokens = 1 + 256
    objective = ReconstructionObjective(tile=tile)
    with training_of(model, backbone=False, connectivity=True), Largest() as watch:
        objective(model, images, target)[0].backward()
    assert all(p.grad is not None for p in predictors(model)[1].parameters())
    if tile == 256:  # the watch sees the map where it is whole
        assert watch.numel >= H * 256 * tokens
    else:
        assert watch.numel <= 128 * tokens  # the hidden layer of an MLP


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("spot", [False, True])
def test_in_the_first_stage_only_connectivity_learns(spot: bool, on: bool) -> None:
    model, _ = make()
    learn_connectivity(model, on)
    if spot:
        spot_vit.sparsify(model, keep=0.5, at=[1])
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(TensorDataset(*data(4)), batch_size=2)
    result = train_connectivity(model, loader, lr=1e-2, weight_decay=0.0, epochs=10, name="test")
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if ".connectivity." in name}
    assert_as_before(model, on)
    assert result["reconstruction"] * 0.01 == pytest.approx(result["loss"], rel=1e-5)
    fresh = make()[0]
    if spot:
        assert model.spot_config.keep == 0.5
    images = data(4)[0]
    losses = []
    for trained in (fresh, model):
        seen = operands(fresh, images)
        losses.append(reconstruction_loss(predictors(trained), seen, seen).item())
    assert losses[1] < 0.9 * losses[0]


def test_a_teacher_with_other_weights_is_reconstructed() -> None:
    model, dense = make()
    images, target = data()
    own, _ = ReconstructionObjective()(model, images, target)
    same, _ = ReconstructionObjective(dense)(model, images, target)
    torch.testing.assert_close(own, same)
    dense.blocks[0].attn.qkv.weight.data.mul_(3)
    other, parts = ReconstructionObjective(dense)(model, images, target)
    assert (other - own).abs() > 1e-3 * own
    seen = operands(make()[0], images), operands(dense, images)
    expected = by_definition(model, *seen)
    torch.testing.assert_close(parts["reconstruction"], expected.detach(), rtol=1e-5, atol=0)


def assert_as_before(model: Any, on: bool) -> None:
    """Gradients of predictors are on or off as they were, all others' on."""
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (on or ".connectivity." not in name), name


@pytest.mark.parametrize("on", [False, True])
def test_in_the_second_stage_connectivity_rests(on: bool) -> None:
    model, dense = make()
    learn_connectivity(model, on)
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(TensorDataset(*data(4)), batch_size=2)
    result = finetune(model, loader, dense, lr=1e-3, name="test")
    after = model.state_dict()
    still = {name for name in after if torch.equal(after[name], before[name])}
    fixed = {"pos_embed", "cls_token"}  # as in DynamicViT's recipe
    assert still == fixed | {name for name in after if ".connectivity." in name}
    assert_as_before(model, on)
    assert {"ce", "kl", "mse"} < set(result) and "ratio" not in result


def test_the_second_loss_is_the_sum_of_its_terms() -> None:
    model, dense = make()
    model.train()
    images, target = data()
    loss, parts = SparsifinerObjective(dense)(model, images, target)
    student = model.forward_features(images)
    logits = model.forward_head(student)
    teacher = dense.forward_features(images)
    goal = dense.forward_head(teacher).softmax(dim=-1)
    kl = (goal * (goal.log() - logits.log_softmax(dim=-1))).sum() / B
    terms = {"ce": F.cross_entropy(logits, target), "kl": kl}
    terms["mse"] = (student - teacher)[:, 1:].square().mean()
    assert set(parts) == set(terms)
    for name, term in terms.items():
        torch.testing.assert_close(parts[name], term)
    torch.testing.assert_close(loss, terms["ce"] + 0.5 * terms["kl"] + 0.5 * terms["mse"])


@pytest.mark.parametrize("decision", ["gumbel", "topk"])
def test_with_spot_both_predictors_meet_and_the_budget_is_kept(decision: str) -> None:
    model, dense = make()
    spot_vit.sparsify(model, keep=0.5, at=[1], train_decision=decision)
    loader = DataLoader(TensorDataset(*data(4)), batch_size=2)
    before = copy.deepcopy(model.state_dict())
    result = finetune(model, loader, dense, lr=1e-4, relevance_lr=1e-2, name="test")
    assert ("ratio" in result) is (decision == "gumbel")
    after = model.state_dict()
    step = {name: (after[name] - before[name]).abs().max().item() for name in after}
    assert all(step[name] == 0 for name in after if ".connectivity." in name)
    # Adam's first steps are as long as the rate.
    assert 1e-3 < step["blocks.1.relevance.fc1.weight"] < 0.05
    assert 1e-5 < step["blocks.1.mlp.fc1.weight"] < 5e-4


def test_self_distillation_teaches_predictors_and_nothing_else() -> None:
    model, dense = make()
    model.train()
    images, target = data()
    plain, _ = SparsifinerObjective(dense)(model, images, target)
    objective = SparsifinerObjective(dense, self_distillation=0.002)
    loss, parts = objective(model, images, target)
    torch.testing.assert_close(loss, plain + 0.002 * parts["own"])
    names, weights = zip(*model.named_parameters(), strict=True)
    grads = zip(
        names,
        torch.autograd.grad(plain, weights, allow_unused=True),
        torch.autograd.grad(loss, weights, allow_unused=True),
        strict=True,
    )
    for name, without, along in grads:
        if ".connectivity." in name:
            assert without is None and along.abs().max() > 0
        elif without is not None:
            assert torch.equal(without, along)


@pytest.mark.parametrize("on", [False, True])
def test_finetuning_with_self_distillation_trains_predictors_too(on: bool) -> None:
    model, dense = make()
    learn_connectivity(model, on)
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(TensorDataset(*data(4)), batch_size=2)
    called = []
    result = finetune(
        model, loader, dense, lr=1e-3, self_distillation=0.002,
        after_backward=lambda: called.append(1),
    )  # fmt: skip
    assert len(called) == 2 and result["own"] > 0
    after = model.state_dict()
    assert all(not torch.equal(after[n], before[n]) for n in after if ".connectivity.proj" in n)
    assert_as_before(model, on)


def test_whoever_trains_predictors_is_told_to_switch_them_on() -> None:
    model, dense = make()
    learn_connectivity(model, False)
    assert not any("predictor" in group["name"] for group in spot_vit.param_groups(model))
    batch = data()
    for objective in (
        ReconstructionObjective(), SparsifinerObjective(dense, self_distillation=0.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"learn_connectivity\(model\)"):
            objective(model, *batch)
        with torch.no_grad():  # only looked at
            objective(model, *batch)
    assert learn_connectivity(model) is model
    assert any("predictor" in group["name"] for group in spot_vit.param_groups(model))
    ReconstructionObjective()(model, *batch)[0].backward()


def official(model: Any, seen: dict[int, Operands]) -> Tensor:
    """Self-distillation as the public code has it: the map that names the keys, against its own."""
    losses = []
    for b, p in predictors(model).items():
        config = p.config
        q, k = (seen[b].q.transpose(1, 2), seen[b].k.transpose(1, 2))
        unmasked = (q @ k.mT * seen[b].scale).softmax(dim=-1)
        if p.proj_c_q is not None:
            q, k = p.proj_c_q(q), p.proj_c_k(k)
        cheap = (q @ (k.permute(0, 1, 3, 2) @ p.proj_n)) * H**-0.5
        coefficients = cheap[..., 1:, :].softmax(dim=-1)
        if config.coef_topk is not None:
            count = min(config.coef_topk, coefficients.shape[-1])
            values, places = coefficients.topk(count, sorted=False)
            coefficients = torch.zeros_like(coefficients).scatter_(-1, places, values)
        elif config.coef_threshold is not None:
            coefficients = torch.nn.Threshold(config.coef_threshold, 0.0)(coefficients)
        up = p.proj_n if p.proj_back_n is None else p.proj_back_n
        basis = torch.nn.Threshold(config.basis_threshold, 0.0)(up.permute(1, 0).abs())
        losses.append(F.mse_loss(coefficients @ basis, unmasked[..., 1:, :], reduction="sum"))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "fields",
    [
        {"reduce_n": 2, "coef_topk": 3},
        {"reduce_n": 2, "coef_topk": None, "coef_threshold": 0.12},
        {"reduce_n": 2, "coef_topk": None, "basis_threshold": 0.0},
        {"reduce_n": 2, "coef_topk": 8, "share_inout_proj": True},
    ],
)
@pytest.mark.parametrize("tile", [5, 100])
def test_self_distillation_and_its_gradients_are_those_of_the_public_code(
    fields: dict[str, Any], tile: int
) -> None:
    model = make(**fields)[0].double()
    for predictor in predictors(model).values():
        for parameter in predictor.parameters():
            parameter.data.mul_(3)  # so that coefficients differ
    seen = operands(model, data()[0].double())
    weights = [p for predictor in predictors(model).values() for p in predictor.parameters()]
    expected = official(model, seen)
    found = reconstruction_loss(predictors(model), seen, seen, tile, thresholds=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    plain = reconstruction_loss(predictors(model), seen, seen, tile)
    assert (plain.double() - expected).abs() > 1e-3 * expected
    for ours, theirs in zip(
        torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


def test_the_objective_distils_the_thresholded_map() -> None:
    model, dense = make()
    model.train()
    images, target = data()
    with torch.no_grad(), record_operands(model) as seen:
        model(images)
    objective = SparsifinerObjective(dense, self_distillation=0.002)
    _, parts = objective(model, images, target)
    torch.testing.assert_close(parts["own"], official(model, seen).detach(), rtol=1e-5, atol=0)


def test_what_does_not_fit_is_named() -> None:
    model, _ = make()
    seen = operands(model, data()[0])
    with pytest.raises(ValueError, match="no operands of block 1"):
        reconstruction_loss(predictors(model), {0: seen[0]}, seen)
    cut = {b: one._replace(q=one.q[:, :9], k=one.k[:, :9]) for b, one in seen.items()}
    with pytest.raises(ValueError, match="teacher: block 0 has 9 tokens, its predictor 17"):
        reconstruction_loss(predictors(model), seen, cut)


@pytest.mark.parametrize("tile", [3, 100])
def test_attention_seen_equals_its_definition(tile: int) -> None:
    model, _ = make()
    seen = operands(model, data()[0])
    found = attention_seen(predictors(model), seen, tile)
    for b, predictor in predictors(model).items():
        q, k = seen[b].q.transpose(1, 2), seen[b].k.transpose(1, 2)
        attention = (q @ k.mT * seen[b].scale).softmax(dim=-1)[:, :, 1:]
        named = torch.zeros_like(attention, dtype=torch.bool)
        index = predictor(seen[b].q[:, 1:], seen[b].k)
        named.scatter_(-1, index.long(), True)
        best = attention.sort(dim=-1, descending=True).values[..., : index.shape[-1]]
        assert found[b][0] == pytest.approx((attention * named).sum(-1).mean().item(), rel=1e-5)
        assert found[b][1] == pytest.approx(best.sum(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("reduce_c", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_regions_are_a_coarse_attention_map(reduce_c: int, shared: bool) -> None:
    fields = {"reduce_n": 13, "reduce_c": reduce_c, "share_inout_proj": shared}
    model, _ = make(64, **fields, basis_threshold=1e-3)
    start_from_regions(model)
    predictor = predictors(model)[0]
    region = _regions((8, 8), 5)
    down, up = predictor.weights()
    assert torch.equal(down, up) and (down[0] == 0).all()
    for r in range(int(region.max()) + 1):
        (patches,) = (region == r).nonzero(as_tuple=True)
        torch.testing.assert_close(
            down[1 + patches, r], torch.full((len(patches),), 1 / len(patches))
        )
        assert (down[:, r] != 0).sum() == len(patches)
    # A query that likes the keys of one region sees that region first.
    liked = torch.randn(1, 1, H, 16, generator=torch.Generator().manual_seed(2))
    k = 0.1 * torch.randn(1, 65, H, 16)
    (patches,) = (region == 2).nonzero(as_tuple=True)
    k[:, 1 + patches] += liked
    index = predictor(4 * liked.expand(1, 64, H, 16), k)
    count = min(len(patches), index.shape[-1])
    assert (torch.isin(index, 1 + patches).sum(dim=-1) == count).all()


@pytest.mark.parametrize(
    ("grid", "count", "shape"),
    [((24, 24), 36, (6, 6)), ((24, 24), 24, (4, 6)), ((8, 4), 8, (4, 2)), ((3, 3), 20, (3, 3)),
     ((5, 7), 1, (1, 1))],
)  # fmt: skip
def test_regions_are_nearly_square(
    grid: tuple[int, int], count: int, shape: tuple[int, int]
) -> None:
    region = _regions(grid, count).reshape(grid)
    assert sorted(set(region.flatten().tolist())) == list(range(shape[0] * shape[1]))
    assert len(region[0].unique()) == shape[1] and len(region[:, 0].unique()) == shape[0]
