"""The connectivity predictor: the method by hand, and other grids."""

from __future__ import annotations

from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.models.sparsifiner import set_grid
from spot_vit.nn.connectivity import ConnectivityPredictor
from support.sparsifiner import (
    masking,
    picture,
    sparse,
    with_backend,
)
from torch import Tensor, nn

# ---- the predictor -------------------------------------------------------------------------------


def predictor_and_operands(
    config: SparsifinerConfig, batch: int = 2, grid: tuple[int, int] = (3, 4), num_prefix: int = 1
) -> tuple[ConnectivityPredictor, Tensor, Tensor]:
    torch.manual_seed(0)
    predictor = ConnectivityPredictor(8, 3, num_prefix, grid, config, dtype=torch.float64)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.5)
    tokens = num_prefix + grid[0] * grid[1]
    q, k = torch.randn(2, batch, tokens, 3, 8, dtype=torch.float64).unbind(0)
    return predictor, q[:, num_prefix:], k


def by_hand(predictor: ConnectivityPredictor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Coefficients as the public code computes them, in its order."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if predictor.proj_c_q is not None:
        q, k = predictor.proj_c_q(q), predictor.proj_c_k(k)
    return (q @ (k.mT @ predictor.proj_n) * scale).softmax(-1)


@pytest.mark.parametrize(("scale", "factor"), [("heads", 3**-0.5), ("channels", 4**-0.5)])
@torch.no_grad()
def test_coefficients_and_the_map_are_those_of_the_public_code(scale: str, factor: float):
    config = SparsifinerConfig(reduce_n=2, scale=scale)
    predictor, q, k = predictor_and_operands(config)
    expected = by_hand(predictor, q, k, factor)
    assert expected.shape == (2, 3, 12, 6)
    torch.testing.assert_close(predictor.coefficients(q, k), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(predictor.approx(q, k), expected @ predictor.proj_back_n.mT)
    tiles = [predictor.approx(q[:, a : a + 5], k) for a in (0, 5, 10)]
    torch.testing.assert_close(torch.cat(tiles, dim=2), predictor.approx(q, k))


@torch.no_grad()
def test_the_papers_form_has_no_channel_reduction():
    config = SparsifinerConfig(reduce_n=3, reduce_c=1, scale="channels")
    predictor, q, k = predictor_and_operands(config)
    assert {name for name, _ in predictor.named_parameters()} == {"proj_n", "proj_back_n"}
    found = predictor.coefficients(q, k)
    torch.testing.assert_close(found, by_hand(predictor, q, k, 8**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "rule", [{"coef_topk": 2}, {"coef_topk": None}, {"coef_topk": None, "coef_threshold": 0.2}]
)
@torch.no_grad()
def test_columns_are_the_best_of_the_thresholded_map(rule: dict[str, Any], share: bool):
    config = SparsifinerConfig(
        keep_rate=0.3, reduce_n=2, share_inout_proj=share, basis_threshold=0.1, **rule
    )
    predictor, q, k = predictor_and_operands(config)
    assert ("proj_back_n" in dict(predictor.named_parameters())) != share
    coefficients = by_hand(predictor, q, k, 3**-0.5)
    if rule["coef_topk"] is not None:
        best = coefficients.topk(2).indices
        coefficients = torch.zeros_like(coefficients).scatter(
            -1, best, coefficients.gather(-1, best)
        )
    if "coef_threshold" in rule:
        coefficients = coefficients * (coefficients > 0.2)
    up = (predictor.proj_n if share else predictor.proj_back_n).abs()
    basis = (up * (up > 0.1)).mT
    assert torch.equal(predictor.basis(), basis) and 0 < (basis == 0).double().mean() < 0.5
    approx = coefficients @ basis
    index = predictor(q, k)
    assert index.dtype == torch.int32 and index.shape == (2, 3, 12, 4)  # ceil(0.3 * 13)
    expected = approx.argsort(dim=-1, descending=True, stable=True)[..., :4].sort(-1).values
    enough = ((approx > 0).sum(-1) >= 4).all() or "coef_threshold" in rule
    assert enough
    named = (approx > 0).sum(-1) >= 4  # elsewhere ties at zero decide
    assert torch.equal(index.long()[named], expected[named]) and named.double().mean() > 0.9


@torch.no_grad()
def test_a_threshold_instead_of_a_budget():
    config = SparsifinerConfig(reduce_n=2, mask="threshold", mask_threshold=0.25, coef_topk=3)
    predictor, q, k = predictor_and_operands(config)
    coefficients = predictor.coefficients(q, k)
    best = coefficients.topk(3).indices
    coefficients = torch.zeros_like(coefficients).scatter(-1, best, coefficients.gather(-1, best))
    seen = coefficients @ predictor.basis() > 0.25
    index = predictor(q, k).long()
    assert index.shape[-1] == 13
    found = torch.zeros(2, 3, 12, 14, dtype=torch.bool).scatter(-1, index % 14, True)[..., :13]
    assert torch.equal(found, seen) and 0.1 < seen.double().mean() < 0.9


@pytest.mark.parametrize(
    ("rate", "budget"),
    [(1.0, 197), (0.9, 178), (0.8, 158), (0.7, 138), (0.6, 119), (0.5, 99), (0.4, 79), (0.3, 60),
     (0.25, 50), (0.2, 40), (0.1, 20), (0.05, 10), (0.01, 2)],
)  # fmt: skip
def test_budgets_are_exact(rate: float, budget: int):
    predictor = ConnectivityPredictor(8, 1, 1, (14, 14), SparsifinerConfig(keep_rate=rate))
    assert predictor.budget(197, 196) == budget
    assert predictor.budget(60, 196) == min(budget, 60)  # of the full grid, capped by survivors
    assert predictor.sparse(197) == (rate < 1)
    exact = ConnectivityPredictor(8, 1, 0, (10, 10), SparsifinerConfig(keep_rate=0.07))
    assert exact.budget(100, 100) == 7  # 100 * 0.07 is 7.000000000000001 in floats


def test_the_index_has_no_gradient_and_the_map_has_all():
    predictor, q, k = predictor_and_operands(SparsifinerConfig(reduce_n=3))
    q, k = q.requires_grad_(), k.requires_grad_()
    assert not predictor(q, k).requires_grad
    inputs = (q, k, *predictor.parameters())
    names = [name for name, _ in predictor.named_parameters()]

    def approx(q: Tensor, k: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            Approx(predictor), {f"inner.{n}": p for n, p in given.items()}, (q, k)
        )

    assert torch.autograd.gradcheck(approx, inputs)


class Approx(nn.Module):
    def __init__(self, inner: ConnectivityPredictor) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.approx(q, k)


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@torch.no_grad()
def test_removed_and_masked_tokens_take_no_part(num_prefix: int):
    config = SparsifinerConfig(keep_rate=0.2, reduce_n=2)
    predictor, q, k = predictor_and_operands(config, num_prefix=num_prefix)
    left = torch.tensor([[0, 3, 4, 7, 8, 11], [1, 2, 3, 5, 9, 10]])
    keep = torch.zeros(2, 12, dtype=torch.float64).scatter(1, left, 1)
    masked = predictor(q, k, keep=keep)
    prefix = torch.arange(num_prefix).expand(2, -1)
    columns = torch.cat([prefix, left + num_prefix], dim=1)
    some = columns[..., None, None]
    compacted = predictor(
        q.take_along_dim(left[..., None, None], 1), k.take_along_dim(some, 1), columns,
        num_patches=12,
    )  # fmt: skip
    back = columns[:, None, None].expand(-1, 3, 6, -1).gather(-1, compacted.long())
    rows = masked.long().take_along_dim(left[:, None, :, None], 2)
    assert torch.equal(rows, back)
    # A token that stands nowhere is last but for ties, and changes nothing about the others.
    nowhere = torch.full((2, 1), num_prefix + 12)
    longer = torch.cat([columns[:, :num_prefix], nowhere, columns[:, num_prefix:]], dim=1)
    keys = k.take_along_dim(columns[..., None, None], 1)
    keys = torch.cat([keys[:, :num_prefix], keys[:, :1] + 1, keys[:, num_prefix:]], dim=1)
    fused = predictor(
        q.take_along_dim(left[..., None, None], 1), keys, longer, num_patches=12
    ).long()
    assert (fused != num_prefix).all()
    assert torch.equal(fused - (fused > num_prefix).long(), compacted.long())


# ---- other grids ---------------------------------------------------------------------------------


@torch.no_grad()
def test_another_grid_resamples_the_rows_of_patches():
    predictor, _, _ = predictor_and_operands(SparsifinerConfig(reduce_n=3), num_prefix=2)
    same = predictor.weights(12)
    assert same[0] is predictor.proj_n and same[1] is predictor.proj_back_n
    down, up = predictor.weights(48)  # 6 x 8
    assert down.shape == up.shape == (50, 4)
    assert torch.equal(down[:2], predictor.proj_n[:2])
    assert torch.equal(up[:2], predictor.proj_back_n[:2])
    # Where a row of patches ramps, so does the larger one; sums keep their size.
    predictor.proj_n[2:] = torch.arange(12.0).reshape(3, 4).double().flatten()[:, None] % 4
    predictor.proj_back_n[2:] = predictor.proj_n[2:]
    down, up = predictor.weights(48)
    ramp = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], dtype=torch.float64)
    torch.testing.assert_close(up[2:, 0].reshape(6, 8), ramp.expand(6, -1))
    torch.testing.assert_close(down[2:] * 4, up[2:])
    torch.testing.assert_close(down[2:].sum(0), predictor.proj_n[2:].sum(0))


def test_grids_in_doubt_are_asked_about():
    predictor, _, _ = predictor_and_operands(SparsifinerConfig(reduce_n=3), grid=(4, 4))
    assert predictor.weights(36)[0].shape == (37, 5)
    with pytest.raises(ValueError, match=r"\(4, 8\) or \(8, 4\).*set_grid"):
        predictor.weights(32)
    model = sparse()
    wide = torch.randn(2, 3, 64, 128, dtype=torch.float64)
    model.set_input_size(img_size=(64, 128))
    assert model(wide).shape == (2, 7)  # whose image says so
    set_grid(model, (8, 4))
    predictor = model.blocks[0].attn.connectivity
    other = predictor.weights(32)[0]
    model(wide)
    assert not torch.allclose(predictor.weights(32)[0], other)


@pytest.mark.parametrize("variant", ["class token", "EVA-02", "NaFlex, rotary", "LV-ViT"])
@torch.no_grad()
def test_other_image_sizes(variant: str):
    model = sparse(variant)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=6 * model.patch_embed.patch_size[0])
        x = picture(model)
    else:
        x = torch.randn(3, 3, 96, 96, dtype=torch.float64)
    keys, shapes = list(model.state_dict()), model.blocks[0].attn.connectivity.proj_n.shape
    out = model(x)
    torch.testing.assert_close(with_backend(model, "dense")(x), out, rtol=0, atol=1e-10)
    assert list(model.state_dict()) == keys
    assert model.blocks[0].attn.connectivity.proj_n.shape == shapes  # as loaded, as saved
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3])
    out = model(x, aux=True)
    assert out.index[0].shape[1] == 21
    masked = masking(model)(x, kept=out.index)
    torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_names_some_is_what_it_says():
    nobody = torch.zeros(2, 12, dtype=torch.float64)
    for num_prefix in (0, 1):
        for mask in ("topk", "threshold"):
            config = SparsifinerConfig(mask=mask, mask_threshold=9.0, keep_rate=0.01, reduce_n=2)
            predictor, q, k = predictor_and_operands(config, num_prefix=num_prefix)
            for keep in (None, nobody):
                named = (predictor(q, k, keep=keep) >= 0).any(dim=-1).all().item()
                assert predictor.names_some(keep) == named
