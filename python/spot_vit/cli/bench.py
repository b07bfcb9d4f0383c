"""`spot bench`: measurements of this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spot_vit.utils.errors import UserError
from spot_vit.utils.folders import prepare_file
from spot_vit.utils.tables import format_table


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    parser = commands.add_parser("bench", help="measurements of this machine")
    benches = parser.add_subparsers(required=True, metavar="what")
    crossover = benches.add_parser(
        "crossover",
        help="where sparse attention beats dense attention with a mask (a minute)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    crossover.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    crossover.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "float64", "float16", "bfloat16"),
        default=["float32"],
        help="of queries, keys and values",
    )
    crossover.add_argument("--tokens", nargs="+", type=int, help="sizes of the table (default all)")
    crossover.add_argument("--threads", type=int, help="CPU threads (default torch's own)")
    crossover.add_argument(
        "--output",
        type=Path,
        default=Path("crossover.json"),
        help="JSON to write; the environment variable SPOT_CROSSOVER may name it later",
    )
    crossover.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures the whole table, keeps it for this machine, prints it and writes it as JSON.

    Returns:
        2 where an option is wrong.
    """
    try:
        if arguments.threads is not None and not 1 <= arguments.threads <= 1024:
            raise UserError(f"--threads: expected 1 to 1024, got {arguments.threads}")
        prepare_file(arguments.output)
        table = _measured(arguments)
    except UserError as error:
        print(f"spot bench: {error}", file=sys.stderr)
        return 2
    print(f"{describe(table)}\n\nwritten: {arguments.output}")
    return 0


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from spot_vit.nn import attention_backend
    from spot_vit.utils.files import save_json

    sizes = arguments.tokens or attention_backend.SIZES
    if unknown := sorted(set(sizes) - set(attention_backend.SIZES)):
        there = ", ".join(map(str, attention_backend.SIZES))
        raise UserError(f"no column of {unknown} tokens; there are {there}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: torch sees no GPU here (`spot info` tells more)")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    table = attention_backend.measure_table(torch.device(arguments.device), dtypes, sizes)
    save_json(arguments.output, table)
    return table


def describe(table: Mapping[str, Any]) -> str:
    """A crossover table as text."""
    from spot_vit.nn.attention_backend import RATES, crossover_rate

    rates = [f"{rate:.0%}" for rate in RATES]
    rows = [["tokens", "dtype", *rates, "sparse up to", *rates]]
    busy = []
    for column in table["columns"]:
        entries = sorted(column["entries"], key=lambda entry: entry["keep_rate"])
        cells = [str(column["tokens"]), column["dtype"]]
        cells += [f"{entry['sparse'] / entry['masked']:.2f}" for entry in entries]
        cells.append(f"{crossover_rate(entries):.0%}")
        cells += [f"{entry['sparse'] / entry['plain']:.2f}" for entry in entries]
        if column["contended"]:
            cells[0] += "*"
            busy.append(column["contended"])
        rows.append(cells)
    about = ", ".join(f"{key} {value}" for key, value in table["machine"].items())
    note = f"\n* on a busy machine, not kept: {busy[0]}" if busy else ""
    return f"""{about}

{format_table(rows)}

first columns  time of sparse attention by that of dense attention with the same mask, by keep rate
sparse up to   the keep rate at which the two are equal: the choice of backend="auto"
last columns   time of sparse attention by that of dense attention without a mask{note}"""
