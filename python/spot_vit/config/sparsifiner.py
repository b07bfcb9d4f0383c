"""The configuration of Sparsifiner attention: which keys each query may see."""

from __future__ import annotations

import dataclasses

from spot_vit.config.fields import Fields, is_number, is_whole, one_of, plain

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

    keep_rate: float = 0.25
    reduce_n: int = 6
    reduce_c: int = 2
    project: bool | None = None
    share_inout_proj: bool = False
    scale: str = "heads"
    coef_topk: int | None = 8
    coef_threshold: float | None = None
    basis_threshold: float = 2e-2
    mask: str = "topk"
    mask_threshold: float = 1e-4
    removed_as_zeros: bool = False
    blocks: tuple[int, ...] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in self.names():
            object.__setattr__(self, name, plain(getattr(self, name)))
        one_of("scale", self.scale, SCALES)
        one_of("mask", self.mask, MASKS)
        one_of("backend", self.backend, BACKENDS)
        if not is_number(self.keep_rate) or not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {self.keep_rate!r}")
        for name in ("reduce_n", "reduce_c", "coef_topk"):
            value = getattr(self, name)
            if name == "coef_topk" and value is None:
                continue
            if not is_whole(value) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        for name in ("share_inout_proj", "removed_as_zeros"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be a bool, got {value!r}")
        if self.project is not None and not isinstance(self.project, bool):
            raise ValueError(f"project must be a bool or None, got {self.project!r}")
        if self.project is False and self.reduce_c > 1:
            raise ValueError(f"project=False needs reduce_c=1, got reduce_c={self.reduce_c}")
        if self.coef_topk is not None and self.coef_threshold is not None:
            raise ValueError("coef_threshold takes the place of coef_topk; set coef_topk=None")
        for name in ("coef_threshold", "basis_threshold", "mask_threshold"):
            value = getattr(self, name)
            if name == "coef_threshold" and value is None:
                continue
            if not is_number(value) or not value >= 0:
                raise ValueError(f"{name} must be a number of 0 or more, got {value!r}")
        self._check_blocks()

    def _check_blocks(self) -> None:
        blocks = self.blocks
        if blocks is None:
            return
        if is_whole(blocks):
            raise ValueError(
                f"blocks must be a list of block indices, got {blocks!r}; for one block: [{blocks}]"
            )
        if not isinstance(blocks, tuple) or not blocks or not all(map(is_whole, blocks)):
            raise ValueError(f"blocks must be a non-empty list of block indices, got {blocks!r}")
        if list(blocks) != sorted(set(blocks)) or blocks[0] < 0:
            raise ValueError(f"blocks must ascend from 0 or more, got {list(blocks)}")

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
