"""State of the tokens in a forward pass: which are left, their positions, what was decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import spot_ext
from spot_vit.nn.decide import mask_of
from spot_vit.nn.evidence import EvidenceHistory
from spot_vit.nn.positional import PositionTables
from spot_vit.utils.twin import twin

FILLS = ("last", "nearest", "zero")
"""What may stand on the full grid where a token was dropped."""


@dataclasses.dataclass
class TokenState:
    """State of the tokens in one forward pass.

    Tokens are [model's prefix | fused | patches]. EViT's fused tokens count as patches, with
    positions from `grid` on, since they compete in later cuts.
    """

    x: Tensor  # [B, P + fused + alive, C]
    tables: PositionTables
    full_tables: PositionTables  # of the full grid
    history: EvidenceHistory
    num_prefix: int  # P, the model's own
    grid: int  # N, patch tokens of the full grid
    num_fused: int = 0  # tokens that soft sparsification added; they stay
    num_rivals: int = 0  # tokens that EViT added; they compete
    mask: Tensor | None = None  # [B, N] where training masks, after the first decision
    position: Tensor | None = None  # [B, alive] grid positions, after the first cut
    stats: Tensor | None = None  # [B, P + fused + alive, H, 6] of the block that has just run
    columns: Tensor | None = None  # [B, P + fused + alive] as in `AttentionRequest`, if sparse
    sparse: bool = False  # whether any attention asks for `columns`
    watched: bool = False  # whether a recorder wants to know where tokens stand
    dropped: Tensor | None = None  # [B, P + N, C] last values on the full grid, when wanted
    masks: list[Tensor] = dataclasses.field(default_factory=list)
    logp: list[Tensor] = dataclasses.field(default_factory=list)
    index: list[Tensor] = dataclasses.field(default_factory=list)

    def copy(self) -> TokenState:
        """A state that goes on from here, and leaves this one as it is."""
        new = twin(self)
        new.history = self.history.copy()
        new.masks, new.logp, new.index = [*self.masks], [*self.logp], [*self.index]
        return new

    @property
    def front(self) -> int:
        """Tokens in front of the patches."""
        return self.num_prefix + self.num_fused

    @property
    def patches(self) -> Tensor:
        """[B, alive, C] tokens that compete."""
        return self.x[:, self.front :]

    @property
    def tokens(self) -> Tensor:
        """[B, P + alive, C] tokens, without fused ones that never compete."""
        if not self.num_fused:
            return self.x
        return torch.cat([self.x[:, : self.num_prefix], self.patches], dim=1)

    @property
    def plain(self) -> bool:
        """Whether a block can run on the tokens as timm wrote it: nothing hidden or displaced."""
        moved = self.tables.tied and self.tables is not self.full_tables
        placed = self.columns is not None or (self.watched and self.position is not None)
        return self.mask is None and not moved and not placed

    def remember(self) -> None:
        """Adds the last block's statistics to the evidence.

        Not the block itself does it: nothing that its backward pass starts with may need what a
        checkpointed block computes again, since its weights may not be at hand yet (FSDP).
        """
        if self.stats is not None:
            self.history.update(self.stats[:, self.front :], self.count())
            self.stats = None

    def count(self) -> Tensor | int:
        """Number of patch tokens alive: [B] where masked, or the same for all."""
        if self.mask is None:
            return self.x.shape[1] - self.front
        mask = self.mask.detach()
        return mask.sum(dim=1, dtype=torch.promote_types(mask.dtype, torch.float32))

    def pooled(self) -> Tensor | None:
        """[B, N] or [B, alive] mask of the patches that the head may pool over; None for all."""
        if self.num_rivals:
            assert self.position is not None
            return (self.position < self.grid).to(self.x.dtype)
        return self.mask

    def all_masks(self) -> list[Tensor]:
        """[B, N] cumulative mask of each stage."""
        if self.mask is not None:
            return self.masks
        size = self.grid + self.num_rivals
        return [mask_of(index, size, self.x.dtype)[:, : self.grid] for index in self.index]

    def positions(self) -> Tensor:
        """[B, alive] grid positions of the patch tokens."""
        if self.position is not None:
            return self.position
        alive = self.x.shape[1] - self.front
        return torch.arange(alive, device=self.x.device).expand(self.x.shape[0], -1)

    def among_alive(self, kept: Tensor) -> Tensor:
        """Grid positions `kept` [B, n] as positions among the patch tokens alive, -1 for others."""
        if self.position is None:
            return kept
        alive = torch.arange(self.position.shape[1], device=kept.device)
        order = kept.new_full((kept.shape[0], self.grid + self.num_rivals), -1)
        return order.scatter(1, self.position, alive.expand_as(self.position)).gather(1, kept)

    def hide(self, mask: Tensor, weight: Tensor | None) -> None:
        """Hides the patches outside `mask` [B, N] from now on, as training does.

        `weight` [B, N] fuses what this stage hides.
        """
        if weight is not None:
            before = 1 if self.mask is None else self.mask.detach()
            gone = (weight * (before - mask.detach())).to(self.x.dtype)
            self._add_fused(spot_ext.fuse_tokens(self.x, gone, self._none(), self.front))
            self._follow_tables()
        self.mask = mask
        self.masks.append(mask)
        self.history.decided(None)

    def cut(self, index: Tensor, weight: Tensor | None) -> None:
        """Keeps the patch tokens `index` [B, n], positions among those alive.

        `weight` [B, alive] fuses the others.
        """
        front, before = self.front, self.x
        if weight is None:
            self.x = spot_ext.compact_tokens(before, index, front)
        else:
            fused = spot_ext.fuse_tokens(before, weight, index, front)[:, None]
            self.x = spot_ext.compact_tokens(before, index, front, fused)
            self.num_fused += 1
        self._follow(index)

    def was_cut(self, x: Tensor, index: Tensor, rival: bool) -> None:
        """Follows a cut inside a block, which left `x`; with `rival` its first patch is new."""
        self.x = x
        self._follow(index, rival)

    def keep_all(self) -> None:
        """Notes a stage that cuts nothing."""
        self.history.decided(None)
        self.index.append(self.positions())

    def _follow(self, index: Tensor, rival: bool = False) -> None:
        self.position = index if self.position is None else self.position.gather(1, index)
        self.index.append(self.position)
        if rival:
            self.position = F.pad(self.position, (1, 0), value=self.grid + self.num_rivals)
            self.num_rivals += 1
        self.history.decided(index)
        self._follow_tables()

    def _follow_tables(self) -> None:
        if self.sparse:
            self.columns = self._columns()
        if self.full_tables.tied:
            self.tables = self.full_tables.at(self.positions(), self.num_prefix, self.num_fused)

    def _columns(self) -> Tensor:
        nowhere = self.num_prefix + self.grid
        position = (self.positions() + self.num_prefix).clamp(max=nowhere)
        prefix = torch.arange(self.num_prefix, device=position.device)
        front = F.pad(prefix, (0, self.num_fused), value=nowhere)
        return torch.cat([front.expand(position.shape[0], -1), position], dim=1)

    def _add_fused(self, token: Tensor) -> None:
        self.x = torch.cat([self.x[:, : self.front], token[:, None], self.patches], dim=1)
        self.num_fused += 1

    def _none(self) -> Tensor:
        return torch.empty(self.x.shape[0], 0, dtype=torch.int64, device=self.x.device)

    def on_grid(
        self,
        fill: str = "last",
        shape: tuple[int, int] | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """[B, P + N, C] tokens of the full grid.

        Args:
            fill: what stands where tokens were dropped: "last", the last value they had, which
                `note_dropped` noted; "nearest", the value of the nearest one that is there; "zero".
            shape: rows and columns of the grid, for "nearest".
            norm: applied to every token, by itself; zeros stay zeros.
        """
        tokens = self.tokens if norm is None else norm(self.tokens)
        if self.position is None and self.mask is None:
            return tokens
        background = self.dropped if fill == "last" else None
        if background is not None and norm is not None:
            background = norm(background)
        if self.mask is not None:
            gone = self.mask.detach() < 0.5
            gone = F.pad(gone, (self.num_prefix, 0))[..., None]  # prefix tokens never go
            other = tokens.new_zeros(()) if background is None else background
            full = torch.where(gone, other, tokens)
        else:
            if background is not None and self.num_rivals:
                background = F.pad(background, (0, 0, 0, self.num_rivals))
            size = self.grid + self.num_rivals
            full = spot_ext.scatter_tokens(
                tokens, self.positions(), size, self.num_prefix, background
            )[:, : self.num_prefix + self.grid]
        if fill != "nearest":
            return full
        assert shape is not None
        place = nearest_alive(self.all_masks()[-1] > 0.5, shape)
        prefix = torch.arange(self.num_prefix, device=place.device).expand(len(place), -1)
        place = torch.cat([prefix, place + self.num_prefix], dim=1)
        return full.gather(1, place[..., None].expand(-1, -1, full.shape[2]))

    def note_dropped(self) -> None:
        """Notes the values that tokens have, in front of a decision that may drop some."""
        self.dropped = self.on_grid()


def nearest_alive(alive: Tensor, shape: tuple[int, int]) -> Tensor:
    """The nearest grid position that is alive, of every position; itself where it is.

    Args:
        alive: [B, N] bool, at least one an image.
        shape: rows and columns of the grid, N together.

    Returns:
        [B, N] int64; of several at the same distance the first.
    """
    rows, columns = (torch.arange(n, device=alive.device, dtype=torch.float32) for n in shape)
    place = torch.cartesian_prod(rows, columns)
    distance = (place[:, None] - place).square().sum(dim=-1)
    return distance.masked_fill(~alive[:, None], float("inf")).argmin(dim=-1)
