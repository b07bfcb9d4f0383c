"""Settings of a report: which models, on which pictures, at which budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spot_vit.config.fields import Fields, relation, setting

MODELS = 4
"""Models or budgets on one page."""


@dataclasses.dataclass(frozen=True)
class ShownFields(Fields):
    """What is shown."""

    keep: tuple[float, ...] | None = setting(
        None, above=0, high=1, distinct=True, text="budgets, shares of tokens: 0.9,0.7 (its own)"
    )
    compare: tuple[str, ...] | None = setting(None, text="further models, side by side")
    data: str | None = setting(None, text="a trace that was written before, in place of a model")
    results: str | None = setting(None, text="JSON of spot eval, for accuracy against keep")
    num_samples: int = setting(16, low=1, high=256, text="images at most")


@dataclasses.dataclass(frozen=True)
class WrittenFields(Fields):
    """What is written."""

    output: str = setting("report.html", text="the page")
    trace: str | None = setting(None, text="the trace as JSON and .npz, for --data (not written)")
    figures: str | None = setting(None, text="folder for each figure as PNG and SVG (none)")
    rounds: int = setting(10, low=0, high=1000, text="passes by which layers are timed; 0 for none")
    threads: int | None = setting(None, low=1, text="CPU threads (torch's own number)")


GROUPS: tuple[type[Fields], ...] = (ShownFields, WrittenFields)
"""The settings in groups, in the order of the help; a docstring is a group's title."""


@dataclasses.dataclass(frozen=True)
class ReportSettings(WrittenFields, ShownFields):
    """What `spot report` is asked for, as plain data; the field `foo_bar` is its flag `--foo-bar`.

    Raises:
        ValueError: any field is of another type or out of range, or does not fit the others.
    """

    checkpoint: str | None = setting(
        None, text="file or folder of a run, any saved model, or timm's name"
    )
    images: tuple[str, ...] | None = setting(
        None, text="pictures, folders of pictures, or 'digits'"
    )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReportSettings:
        """Settings from what `to_dict` gave."""
        return cls(**data)

    @relation("checkpoint", "images", "data")
    def _there_is_something_to_show(self) -> str | None:
        if self.data is not None:
            given = self.checkpoint is not None or self.images or self.compare or self.keep
            return "data is a finished trace: name no model, images or budgets" if given else None
        if self.checkpoint is None:
            return "checkpoint must name a file, a run's folder or a model; or give data"
        return None if self.images else "images must name pictures, folders, or 'digits'"

    @relation("keep", "compare")
    def _it_fits_on_a_page(self) -> str | None:
        if self.compare and self.keep is not None and len(self.keep) > 1:
            return "compare goes with one keep: several budgets are of one model"
        if len(self.compare or ()) >= MODELS or len(self.keep or ()) > MODELS:
            return f"a page shows at most {MODELS} models or budgets"
        return None
