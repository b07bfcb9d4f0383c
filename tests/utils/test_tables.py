"""Plain text tables."""

from __future__ import annotations

from spot_vit.utils.tables import format_table


def test_table_columns_line_up() -> None:
    lines = format_table([["", "top-1"], ["dense", "97.00%"], ["SPOT", "9%"]]).split("\n")
    assert lines == [
        "        top-1",
        "-------------",
        "dense  97.00%",
        "SPOT       9%",
    ]
