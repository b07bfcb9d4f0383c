"""A trace as plain data: what a sparse pass did to every patch, written to a file and read again.

`docs/report.md` lists the fields. Arrays are NumPy's; nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA = 1
"""Of the files; a reader refuses others."""

STATISTICS = ("cls_out", "cls_in", "row_mean", "row_var", "col_mean", "col_var")
"""The six of `attention_stats`, in its order."""

Array = np.ndarray


@dataclasses.dataclass
class StageTrace:
    """One decision about one image.

    Positions from `grid` patches on are tokens that fusing made and that compete (EViT).

    Attributes:
        block: at which it was taken.
        inside: between attention and MLP, not in front of the block.
        position: int32 [n], grid positions of the patches that came to it.
        kept: bool [n], which of them stayed.
        scored: what a score is: "log-odds" of keeping, or "attention" of the class token; None
            where nothing scored the patches.
        score: float32 [n], what they were ranked by; None likewise.
        rank: int32 [n], 0 for the best; None likewise.
        cut: halfway between the worst score that was kept and the best that was dropped; None where
            none or all were dropped.
        weight: float32 [n], with which dropped ones went into a fused token, 0 for those kept; None
            where nothing is fused.
        effect: float32 [n] by group of evidence: how much the log-odds owe to what the group says
            of this patch, see `evidence_effects`.
        vote: int32 [n], the class that the model would have named, by this patch alone.
        vote_share: float32 [n], its probability.
    """

    block: int
    inside: bool
    position: Array
    kept: Array
    scored: str | None
    score: Array | None
    rank: Array | None
    cut: float | None
    weight: Array | None
    effect: dict[str, Array]
    vote: Array
    vote_share: Array


@dataclasses.dataclass
class BlockTrace:
    """Attention of one block on one image.

    Attributes:
        block: which.
        front: tokens in front of the patches: the model's prefix, and fused ones.
        position: int32 [n], grid positions of the patches.
        statistics: float32 [n, H, 6] in the order of `STATISTICS`; None where the block computes
            none.
        attention: float16 [H, front + n, front + n], rows of queries; None where not asked for.
        named: int16 [n, H], how many patches each patch sees; None without sparse attention.
        held: float16 [n, H], how much of its dense attention these and the front hold.
    """

    block: int
    front: int
    position: Array
    statistics: Array | None
    attention: Array | None = None
    named: Array | None = None
    held: Array | None = None


@dataclasses.dataclass
class ImageTrace:
    """What a pass did with one image.

    Attributes:
        name: of the image, as given.
        label: index of its class, or None.
        picture: uint8 [H, W, 3], as the model saw it.
        logits: float32 [classes].
        dense_logits: the same of the pass in which nothing is removed.
        stages: its decisions, in order.
        blocks: its blocks, in order; those without anything to tell are left out.
    """

    name: str
    label: int | None
    picture: Array
    logits: Array
    dense_logits: Array
    stages: list[StageTrace]
    blocks: list[BlockTrace]


@dataclasses.dataclass
class LayerCost:
    """Cost of a layer per image.

    Attributes:
        name: "stem", "blocks.0", ..., "head".
        tokens: that it sees, the prefix included; 0 for the stem.
        gmacs: billions of multiply-accumulates.
        ms: median time at batch 1; None where it was not measured.
    """

    name: str
    tokens: int
    gmacs: float
    ms: float | None


@dataclasses.dataclass
class ModelTrace:
    """The model that was traced.

    Attributes:
        name: architecture, or class.
        conversions: configuration of each conversion, by its name.
        keep: cumulative keep ratio of each stage.
        grid: rows and columns of patches.
        prefix: names of the model's prefix tokens.
        heads: of attention.
        classes: their names, or None.
        layers: cost of each layer.
        dense_layers: cost of each layer where nothing is removed.
    """

    name: str
    conversions: dict[str, Any]
    keep: list[float]
    grid: tuple[int, int]
    prefix: list[str]
    heads: int
    classes: list[str] | None
    layers: list[LayerCost]
    dense_layers: list[LayerCost]


@dataclasses.dataclass
class TraceData:
    """What one pass did with some images: `spot_vit.Trace`, which can also show itself, as data.

    Attributes:
        model: that was traced.
        images: what happened to each.
        facts: date, machine, versions.
        notes: sentences that a reader should see.
        schema: of the file.
    """

    model: ModelTrace
    images: list[ImageTrace]
    facts: dict[str, Any]
    notes: list[str] = dataclasses.field(default_factory=list)
    schema: int = SCHEMA

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `path`, as JSON, and beside it the arrays, with the ending ``.npz``.

        Raises:
            UserError: the files cannot be written.
        """
        arrays: dict[str, Array] = {}
        plain = _plain(self, "", arrays)
        path = Path(path)
        with atomic_write(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

        Raises:
            UserError: a file is missing, damaged, or of another schema.
        """
        path = Path(path)
        try:
            plain = json.loads(path.read_text())
            found = plain.get("schema") if isinstance(plain, dict) else None
            if found != SCHEMA:
                raise UserError(
                    f"{path} is no trace of schema {SCHEMA} (it says {found!r}): trace again"
                )
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                return _made(cls, plain, dict(arrays))
        except FileNotFoundError as error:
            raise UserError(
                f"a trace is two files, .json and .npz: {error.filename} is missing"
            ) from error
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged: {error}") from error


# ---- to JSON and back ----------------------------------------------------------------------------


def _plain(value: Any, place: str, arrays: dict[str, Array]) -> Any:
    """A value as JSON has it; arrays go to `arrays`, under the place that they stand at."""
    if isinstance(value, np.ndarray):
        arrays[place] = value
        return {"array": place}
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one, f"{place}/{key}", arrays) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, f"{place}/{i}", arrays) for i, one in enumerate(value)]
    return value.item() if isinstance(value, np.generic) else value


def _made(kind: Any, plain: Any, arrays: Mapping[str, Array]) -> Any:
    """The object that `_plain` took apart."""
    if isinstance(plain, dict) and set(plain) == {"array"}:
        return arrays[plain["array"]]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _made(hints[name], plain[name], arrays) for name in hints})
    inside = getattr(kind, "__args__", ())
    if isinstance(plain, list):
        made = [_made(inside[0] if inside else None, one, arrays) for one in plain]
        return tuple(made) if getattr(kind, "__origin__", None) is tuple else made
    if isinstance(plain, dict):
        return {
            key: _made(inside[-1] if inside else None, one, arrays) for key, one in plain.items()
        }
    return plain
