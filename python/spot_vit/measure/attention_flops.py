"""Cost of attention alone, as Sparsifiner's paper counts it (arXiv 2303.13755)."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.measure.flops import count_flops
from spot_vit.nn.connectivity import STD


class MhsaFlops(NamedTuple):
    """Multiply-accumulates per image.

    Attributes:
        products: q k^T and A v over all blocks; projections are not counted.
        connectivity: the predictors.
    """

    products: int
    connectivity: int

    @property
    def total(self) -> int:
        """Multiply-accumulates of products and predictors."""
        return self.products + self.connectivity


def mhsa_flops(model: nn.Module, input_size: tuple[int, int, int]) -> MhsaFlops:
    """Counts the attention of one eval forward pass at the current budget.

    With n tokens of width D, one of them a class token, and k keys a query, L blocks have
    `2 L D (n - 1) k` multiply-accumulates of products, `2 L D n` of dense class rows, and their
    predictors; see `mhsa_constant`. Statistics for SPOT are left out.

    Args:
        model: a model with `blocks`, dense or sparse, with or without token removal.
        input_size: (channels, height, width) of one image.
    """
    count = count_flops(model, input_size)
    return MhsaFlops(sum(layer.products for layer in count.layers), count.connectivity)


def mhsa_constant(
    depth: int, dim: int, num_heads: int, num_tokens: int, config: SparsifinerConfig | None = None
) -> int:
    """C0: what Sparsifiner's attention costs beside the products of patch queries, by formula.

    Per block, with n tokens, R = n // reduce_n, c = (D / H) // reduce_c, s coefficients a row and
    a share p of nonzero basis entries:

        2 n D                       class row
        + n R D                     keys to R
        + 2 R D c + R H c           their channels and back, with a bias
        + (n - 1) R D               coefficients
        + H (n - 1) s p n           combination of basis rows

    Where it is less, keys and queries are projected first, and instead of the three rows in the
    middle there are

        + (2 n - 1) (D + R H) c     channels of keys and queries, keys to R, coefficients

    p is what initialisation gives. All this is without `coef_threshold`. The published code
    projects first, whatever the sizes.
    """
    config = config or SparsifinerConfig()
    head_dim, rank = dim // num_heads, num_tokens // config.reduce_n
    channels = head_dim // config.reduce_c
    used = rank if config.coef_topk is None else min(config.coef_topk, rank)
    share = math.erfc(config.basis_threshold / (STD * math.sqrt(2)))
    patches = num_tokens - 1
    both = num_tokens + patches
    made = both * rank * dim
    if config.projects:
        back = 2 * rank * dim * channels + rank * num_heads * channels
        made = min(made + back, both * (dim + rank * num_heads) * channels)
    block = 2 * num_tokens * dim + made
    return depth * (block + round(num_heads * patches * used * share * num_tokens))
