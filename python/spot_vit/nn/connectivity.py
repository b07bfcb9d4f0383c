"""Sparsifiner's connectivity predictor: which keys each query attends to, before any is read.

METHOD, in the notation of the public code (arXiv 2303.13755), for n tokens and heads of width d:

    q' = W_q q, k' = W_k k                     channels: d -> c, one pair for all heads
    coefficients = softmax(q' (k'^T W_down) * scale)         W_down [n, R], R = n // reduce_n
    approx = top(coefficients) |W_up|^T        W_up [n, R], small entries zero

and each patch query sees the columns where its row of `approx` is largest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import functional as F

import spot_ext
from spot_vit.config.fields import exact
from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.nn.attention_backend import choose
from spot_vit.nn.predictor import Predictor, plain_layer
from spot_vit.utils.tracing import known

STD = 0.02  # of all weights at first, published


class ConnectivityPredictor(Predictor):
    """Predicts connectivity from the queries and keys of one attention module.

    These are taken after timm's qk norm and rotary embedding, and before they are scaled (our
    reading). Parameters have the names of the public code. They belong to the grid they were made
    for; another grid resamples them along the tokens, see `weights`.

    Args:
        head_dim: d.
        num_heads: H.
        num_prefix: P, the model's own prefix tokens.
        grid: rows and columns of patches.
        config: how connectivity is predicted, and how much of it.
        device: of the parameters.
        dtype: of the parameters.
    """

    proj_back_n: nn.Parameter | None

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_prefix: int,
        grid: tuple[int, int],
        config: SparsifinerConfig,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.num_prefix, self.grid = num_prefix, grid
        tokens = num_prefix + grid[0] * grid[1]
        rank, channels = tokens // config.reduce_n, head_dim // config.reduce_c
        if rank < 1:
            raise ValueError(f"reduce_n={config.reduce_n} leaves none of {tokens} tokens")
        if channels < 1:
            raise ValueError(f"reduce_c={config.reduce_c} leaves none of {head_dim} channels")
        self.proj_c_q = self.proj_c_k = None
        if config.projects:
            self.proj_c_q = nn.Linear(head_dim, channels, **made)
            self.proj_c_k = nn.Linear(head_dim, channels, **made)
            for linear in (self.proj_c_q, self.proj_c_k):
                trunc_normal_(linear.weight, std=STD)
                nn.init.zeros_(linear.bias)
        self.proj_n = nn.Parameter(torch.empty(tokens, rank, **made))
        shared = config.share_inout_proj
        up = None if shared else nn.Parameter(torch.empty(tokens, rank, **made))
        self.register_parameter("proj_back_n", up)
        for matrix in (self.proj_n, up):
            if matrix is not None:
                trunc_normal_(matrix, std=STD)
        self.scale = (num_heads if config.scale == "heads" else channels) ** -0.5
        self.enabled = True  # see `dense_attention`
        self.shown_grid: tuple[int, int] | None = None
        self.configure(config)

    def configure(self, config: SparsifinerConfig) -> None:
        """Takes over everything but shapes and scale from a configuration."""
        self.config = config
        rate = exact(config.keep_rate)
        self.rate = rate.numerator, rate.denominator  # plain ints, which torch.compile can trace

    # ---- the method ------------------------------------------------------------------------------

    def coefficients(
        self,
        q: Tensor,
        k: Tensor,
        columns: Tensor | None = None,
        keep: Tensor | None = None,
        num_patches: int | None = None,
    ) -> Tensor:
        """Coefficients of the basis, differentiable in q, k and the parameters.

        What training reads, and `coef_threshold` needs; `forward` makes them inside an op.

        Args:
            q: [B, M, H, D] patch queries, all of them or some.
            k: [B, N, H, D] keys of all tokens.
            columns: [B, N] int64, the token of the full grid that each key is, n for those that are
                none (fused tokens); they take no part. None when no token was cut or added.
            keep: [B, N-P] of 0 and 1, patch tokens that are still seen (training), or None.
            num_patches: of the full grid; needed with `columns`.

        Returns:
            [B, H, M, R], rows sum to 1.
        """
        down, _ = self.weights(self._patches(k, columns, num_patches))
        q, k, projections = self._projected(q, k)
        if columns is not None:
            down = F.pad(down, (0, 0, 0, 1))[columns]  # [B, N, R]
        if keep is not None:
            prefix = keep.new_ones(keep.shape[0], k.shape[1] - keep.shape[1])
            seen = torch.cat([prefix, keep.detach()], dim=1).to(down.dtype)
            down = down * seen[..., None]
        # [B, R, H * D]; not matmul, which would copy keys that are a view of qkv.
        keys = down.mT.expand(k.shape[0], -1, -1).bmm(k.flatten(2))
        keys = keys.unflatten(2, k.shape[2:])
        if projections:
            # [B, R, H, c]: the bias of every key is added up as the keys are.
            bias = down.sum(dim=-2)[..., None, None] * projections["key_bias"]
            keys = F.linear(keys, projections["key_weight"]) + bias
            q = F.linear(q, projections["query_weight"], projections["query_bias"])
        return (q.transpose(1, 2) @ (keys * self.scale).permute(0, 2, 3, 1)).softmax(dim=-1)

    def _projected(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Queries and keys, and the weights that are still to project their channels.

        Layers that cannot be read (see `plain_layer`) are called, and nothing is left to do.
        """
        if self.proj_c_q is None or self.proj_c_k is None:
            return q, k, {}
        if not plain_layer(self.proj_c_q, self.proj_c_k):
            return self.proj_c_q(q), self.proj_c_k(k), {}
        return q, k, {
            "query_weight": self.proj_c_q.weight, "query_bias": self.proj_c_q.bias,
            "key_weight": self.proj_c_k.weight, "key_bias": self.proj_c_k.bias,
        }  # fmt: skip

    def basis(self, num_patches: int | None = None) -> Tensor:
        """[R, n] |W_up|^T, entries up to the threshold zero; no gradient."""
        _, up = self.weights(num_patches)
        return F.threshold(up.detach().abs(), self.config.basis_threshold, 0, inplace=True).mT

    def approx(self, q: Tensor, k: Tensor) -> Tensor:
        """The dense low-rank map of the first training stage, without thresholds.

        Args:
            q: [B, M, H, D] patch queries, all of them or a tile.
            k: [B, N, H, D] keys of all tokens.

        Returns:
            [B, H, M, N], differentiable in q, k and the parameters.
        """
        _, up = self.weights(self._patches(k))
        return self.coefficients(q, k) @ up.mT

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        columns: Tensor | None = None,
        keep: Tensor | None = None,
        num_patches: int | None = None,
    ) -> Tensor:
        """Columns that each patch query may see; an index, so nothing is differentiable.

        Arguments are those of `coefficients`; q of all patch tokens in play.

        Returns:
            [B, H, M, K] int32 ascending positions among the N keys; -1 where there are fewer.
        """
        config = self.config
        with torch.no_grad():
            num_patches = self._patches(k, columns, num_patches)
            cut = columns is not None and keep is None
            budget = self.budget(k.shape[1], num_patches, q.shape[1] if cut else None)
            index = self._named(q, k, budget, columns, keep, num_patches)
            if config.removed_as_zeros and config.mask == "topk" and keep is not None:
                index = self._capped(index, q, k, columns, keep, num_patches)
            return index

    def _named(
        self,
        q: Tensor,
        k: Tensor,
        budget: int,
        columns: Tensor | None,
        keep: Tensor | None,
        num_patches: int,
    ) -> Tensor:
        """What `forward` returns, of at most `budget` keys."""
        config = self.config
        threshold = config.mask_threshold if config.mask == "threshold" else None
        if config.coef_threshold is None:
            down, up = self.weights(num_patches)
            q, k, projections = self._projected(q, k)
            return spot_ext.predict_connectivity(
                q, k, down, up, budget, columns, keep, **projections, scale=self.scale,
                coef_topk=config.coef_topk, basis_threshold=config.basis_threshold,
                threshold=threshold,
            )  # fmt: skip
        coefficients = self.thinned(self.coefficients(q, k, columns, keep, num_patches))
        basis = self._padded_basis(columns, num_patches)
        return spot_ext.connectivity(
            coefficients, basis, budget, columns, keep, threshold=threshold
        )

    def _capped(
        self,
        index: Tensor,
        q: Tensor,
        k: Tensor,
        columns: Tensor | None,
        keep: Tensor,
        num_patches: int,
    ) -> Tensor:
        """`index` with the best keys alone, as many as its image has patch tokens left.

        For `removed_as_zeros` in training, where that number is another for each image.
        """
        coefficients = self.thinned(self.coefficients(q, k, columns, keep, num_patches))
        basis = self._padded_basis(columns, num_patches)
        basis = basis if columns is None else basis[:, columns].permute(1, 0, 2)[:, None]
        place = index.clamp(min=0).long()
        value = (coefficients @ basis).gather(-1, place).masked_fill(index < 0, -math.inf)
        order = value.argsort(dim=-1, descending=True, stable=True)  # ties to the lower column
        left = keep.detach().sum(dim=1, dtype=torch.float64).long()
        most = torch.where(left < keep.shape[1], left.clamp(min=1), index.shape[3])
        excess = order.argsort(dim=-1) >= most[:, None, None, None]
        behind = torch.where(excess | (index < 0), k.shape[1], index).sort(dim=-1).values
        return behind.masked_fill(behind == k.shape[1], -1).to(index.dtype)

    def thinned(self, coefficients: Tensor) -> Tensor:
        """Coefficients [..., R] with those that take no part zero."""
        least, most = self.config.coef_threshold, self.config.coef_topk
        if least is not None:
            return coefficients.masked_fill(coefficients <= least, 0)
        if most is None or most >= coefficients.shape[-1]:
            return coefficients
        best = coefficients.topk(most, dim=-1)
        return torch.zeros_like(coefficients).scatter(-1, best.indices, best.values)

    def _padded_basis(self, columns: Tensor | None, num_patches: int) -> Tensor:
        """`basis`; with `columns` a last column of zeros, that of tokens which are of no grid."""
        basis = self.basis(num_patches)
        return basis if columns is None else F.pad(basis, (0, 1))

    def backend(self, q: Tensor, num_named: int) -> str:
        """How to attend to `num_named` keys a query: "sparse" or "dense"."""
        if self.config.backend != "auto":
            return self.config.backend
        num_tokens = known(q.shape[1])
        if not has_static_value(num_tokens):  # traced for many sizes: nothing to look up
            return "sparse"
        return _faster(num_tokens * 1, known(num_named) * 1, q.dtype, q.device)

    # ---- sizes -----------------------------------------------------------------------------------

    def budget(self, num_tokens: int, num_patches: int, num_left: int | None = None) -> int:
        """Keys for each patch query, of `num_tokens` in play and `num_patches` on the full grid.

        `num_left` is the number of patch tokens after a cut; `removed_as_zeros` allows no more.
        """
        num_tokens = known(num_tokens)
        if self.config.mask == "threshold":
            return num_tokens
        most = num_tokens
        if self.config.removed_as_zeros and num_left is not None:
            most = known(num_left)
        over, under = self.rate
        return min(-(-(self.num_prefix + num_patches) * over // under), most)

    def sparse(
        self, num_tokens: int, num_patches: int | None = None, removed: bool = False
    ) -> bool:
        """Whether any query sees less than all of `num_tokens` keys, prefix tokens among them.

        `removed` says whether patch tokens were cut or are masked where there is a prefix.
        """
        if not self.enabled:
            return False
        if removed and self.config.removed_as_zeros:
            return True  # the budget counts patch tokens alone, and prefix keys are named too
        num_tokens = known(num_tokens)
        if num_patches is None:
            num_patches = num_tokens - self.num_prefix
        return self.config.mask == "threshold" or self.budget(num_tokens, num_patches) < num_tokens

    def names_some(self, keep: Tensor | None) -> bool:
        """Whether every query surely names a key, with patch tokens masked by `keep`."""
        return self.config.mask == "topk" and (keep is None or self.num_prefix > 0)

    def density(self) -> float:
        """Share of nonzero entries in the basis; without weights what initialisation gives."""
        _, up = self.weights()
        if up.is_meta:
            return math.erfc(self.config.basis_threshold / (STD * math.sqrt(2)))
        wide = up.detach().to(torch.promote_types(up.dtype, torch.float32))  # as the op compares
        return (wide.abs() > self.config.basis_threshold).double().mean().item()

    def weights(self, num_patches: int | None = None) -> tuple[Tensor, Tensor]:
        """W_down and W_up [n, R] for a grid of `num_patches`.

        On another grid than the parameters' the rows of patches are resampled bilinearly, and
        those of W_down divided by the growth of the grid, so that sums over tokens keep their
        size; prefix rows stay (our choice; the public code knows one grid).
        """
        down = self.proj_n
        up = down if self.proj_back_n is None else self.proj_back_n
        here = self.grid[0] * self.grid[1]
        grid = self.grid if num_patches is None else self._grid_of(num_patches)
        if grid == self.grid:
            return down, up
        growth = grid[0] * grid[1] / here
        return self._resampled(down, grid, 1 / growth), self._resampled(up, grid, 1.0)

    def _resampled(self, matrix: Tensor, grid: tuple[int, int], factor: float) -> Tensor:
        prefix, patches = matrix[: self.num_prefix], matrix[self.num_prefix :]
        image = patches.mT.unflatten(1, self.grid)[None]  # [1, R, rows, columns]
        image = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
        return torch.cat([prefix, factor * image[0].flatten(1).mT])

    def _grid_of(self, num_patches: int) -> tuple[int, int]:
        """The grid of so many patches whose shape is nearest to the parameters' grid."""
        shown = self.shown_grid
        if shown is not None and shown[0] * shown[1] == num_patches:
            return shown
        rows, columns = self.grid
        if num_patches == rows * columns:
            return self.grid
        grids = [(r, num_patches // r) for r in range(1, num_patches + 1) if num_patches % r == 0]

        def distance(grid: tuple[int, int]) -> float:
            ratio = grid[0] * columns / (grid[1] * rows)
            return max(ratio, 1 / ratio)

        best = min(grids, key=distance)
        same = [grid for grid in grids if distance(grid) == distance(best)]
        if len(same) > 1:
            raise ValueError(
                f"{num_patches} patches may stand as {same[0]} or {same[1]}: say which with "
                "spot_vit.models.sparsifiner.set_grid"
            )
        return best

    def _patches(
        self, k: Tensor, columns: Tensor | None = None, num_patches: int | None = None
    ) -> int:
        if num_patches is not None:
            return num_patches
        assert columns is None, "num_patches is needed with columns"
        return known(k.shape[1]) - self.num_prefix


@torch.compiler.assume_constant_result
def _faster(num_tokens: int, num_named: int, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that was measured to be faster; a constant where torch.compile traces."""
    return choose(num_tokens, num_named / num_tokens, dtype, device)
