"""`Trace`: what a pass did, as data that a notebook shows as a page."""

from __future__ import annotations

import dataclasses

from markupsafe import Markup

from spot_vit.report.page import render
from spot_vit.report.record import TraceData

IN_NOTEBOOK = 16
"""Images that a notebook shows: it stores what it shows, some 300 kB an image."""


@dataclasses.dataclass
class Trace(TraceData):
    """What one pass did with some images; see `spot_vit.trace`.

    In a notebook it shows itself as the page of `spot report`.
    """

    def _repr_html_(self) -> str:
        """The page of the first images in a frame that can reach nothing outside it."""
        first = dataclasses.replace(self, images=self.images[:IN_NOTEBOOK])
        frame = (
            '<iframe srcdoc="{}" title="{}" sandbox="allow-scripts" '
            'style="width:100%;height:800px;border:0"></iframe>'
        )
        shown = Markup(frame).format(render([(self.model.name, first)]), self.model.name)
        if len(self.images) > IN_NOTEBOOK:
            told = "The first {} of {} images; all of them are in the page of spot report."
            shown += Markup("<p>{}</p>").format(told.format(IN_NOTEBOOK, len(self.images)))
        return shown
