"""The configuration of Sparsifiner attention: which keys each query may see."""

from __future__ import annotations

import dataclasses

from spot_vit.config.fields import Fields, relation, setting

SCALES = ("heads", "channels")
MASKS = ("topk", "threshold")
BACKENDS = ("auto", "sparse", "dense")


@dataclasses.dataclass(frozen=True)
class SparsifinerConfig(Fields):
    """Configuration of Sparsifiner (arXiv 2303.13755); the defaults are those of its public code.

    n is the number of tokens of the full grid, prefix included, and d the width of a head.

    Attributes:
        keep_rate: ⌈keep_rate n⌉ keys for each patch query, or all that are alive if those are
            fewer; the decimal is exact.
        reduce_n: tokens are projected to ⌊n / reduce_n⌋ of them.
        reduce_c: queries and keys are projected to d // reduce_c channels; 1 leaves them (the
            paper's form).
        project: whether queries and keys are projected; None for where that makes them narrower.
            The published code always does, at reduce_c=1 by square layers.
        share_inout_proj: one matrix projects tokens down and up.
        scale: factor of the low-rank logits: "heads" is H**-0.5 (published code), "channels" is
            (d // reduce_c)**-0.5 (what the paper writes).
        coef_topk: coefficients kept in each row, or None for all.
        coef_threshold: coefficients must exceed it, or None; needs `coef_topk=None` (published
            alternative: 5e-2).
        basis_threshold: entries of |W_up| that do not exceed it are zero.
        mask: "topk" names the best keys, as many as `keep_rate` says; "threshold" names those
            whose approximated attention exceeds `mask_threshold`, and `keep_rate` is not used.
        mask_threshold: published alternative to a budget.
        removed_as_zeros: what the public code does with tokens that were removed (see
            docs/sparsifiner.md): prefix queries of sparse blocks go on seeing them, with keys and
            values of zero, and after a removal no query sees more keys than patch tokens are left.
            By default they are gone.
        blocks: indices of the blocks with sparse attention, ascending; None for all.
        backend: "sparse" reads only the keys that are named, "dense" computes all of the map and
            masks it, "auto" takes the faster one by measurement. The result is the same.
    """

    keep_rate: float = setting(0.25, low=1e-6, high=1, expected="in (0, 1], from 1e-06 on")
    reduce_n: int = setting(6, low=1)
    reduce_c: int = setting(2, low=1)
    project: bool | None = None
    share_inout_proj: bool = False
    scale: str = setting("heads", choices=SCALES)
    coef_topk: int | None = setting(8, low=1)
    coef_threshold: float | None = setting(None, low=0)
    basis_threshold: float = setting(2e-2, low=0)
    mask: str = setting("topk", choices=MASKS)
    mask_threshold: float = setting(1e-4, low=0)
    removed_as_zeros: bool = False
    blocks: tuple[int, ...] | None = setting(
        None,
        low=0,
        ascending=True,
        expected="a non-empty list of block indices that ascend, or None",
    )
    backend: str = setting("auto", choices=BACKENDS)

    @relation("project", "reduce_c")
    def _projection_fits(self) -> str | None:
        if self.project is not False or self.reduce_c == 1:
            return None
        return f"project=False needs reduce_c=1, got reduce_c={self.reduce_c}"

    @relation("coef_topk", "coef_threshold")
    def _one_way_to_choose(self) -> str | None:
        if self.coef_topk is None or self.coef_threshold is None:
            return None
        return "coef_threshold takes the place of coef_topk; set coef_topk=None"

    @property
    def projects(self) -> bool:
        """Whether queries and keys are projected."""
        return self.reduce_c > 1 if self.project is None else self.project

    def sparse_blocks(self, depth: int) -> tuple[int, ...]:
        """Indices of the sparse blocks of a model of `depth` blocks."""
        blocks = tuple(range(depth)) if self.blocks is None else self.blocks
        if blocks[-1] >= depth:
            raise ValueError(f"blocks names block {blocks[-1]}, the model has {depth}")
        return blocks
