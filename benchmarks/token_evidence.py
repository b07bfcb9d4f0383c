"""Cases of `token_evidence`: the evidence of DeiT-S's decisions beside its definition."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from spot_vit.utils.timing import Case, Side
from torch import Tensor

from spot_ext import token_evidence, token_evidence_reference

DEFINITION = "the definition in plain PyTorch"
TOKENS = (196, 167, 139)  # before each decision
HEADS, BLOCKS = 6, 3  # blocks before each decision
COPIES = 4  # passes in turns, so that statistics are not always in first-level cache


class Decision:
    """What the `number`-th decision has to look at, of several passes."""

    def __init__(self, batch: int, number: int, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)
        self.followed = [k for k in range(number + 1) for _ in range(BLOCKS)]
        self.counts = [TOKENS[k] for k in self.followed]

        def statistics(count: int) -> Tensor:
            drawn = torch.rand(batch, 1 + count, HEADS, 6, generator=draw, device=device)
            return 2 * drawn / count

        def cut(k: int) -> Tensor:
            order = torch.rand(batch, TOKENS[k], generator=draw, device=device).argsort(dim=1)
            return order[:, : TOKENS[k + 1]].sort(dim=1).values

        self.passes = [
            ([statistics(count) for count in self.counts], [cut(k) for k in range(number)])
            for _ in range(COPIES)
        ]

    def _side(self, call: object) -> Side:
        assert callable(call)

        def side(i: int) -> Tensor:
            stats, cuts = self.passes[i % COPIES]
            return call(stats, self.counts, self.followed, cuts)

        return side

    def ours(self) -> Side:
        """`token_evidence`."""
        return self._side(token_evidence)

    def defined(self) -> Side:
        """Its definition, which is what a model would do by itself."""
        return self._side(token_evidence_reference)


def cases(device: str) -> Iterator[Case]:
    """One image, where calls count, and a batch, where memory does."""
    if device != "cpu":
        return
    for batch in (1, 32):
        for number, tokens in enumerate(TOKENS):
            decision = Decision(batch, number, device)
            read = 4 * batch * tokens * HEADS * 6 * len(decision.counts)
            written = 4 * batch * tokens * HEADS * 18
            yield Case(
                f"decision {number + 1}, {batch} x {tokens} tokens, {len(decision.counts)} blocks",
                decision.ours(), {DEFINITION: decision.defined()}, {DEFINITION: 4.0},
                read + written,
            )  # fmt: skip
