"""`spot bench`: a model's speed in every runtime; where sparse attention pays on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spot_vit.config import flags
from spot_vit.config.bench import GROUPS, BenchSettings
from spot_vit.config.flags import Formatter, add_flags, keep_rest
from spot_vit.utils.errors import UserError
from spot_vit.utils.folders import prepare_file
from spot_vit.utils.tables import format_table

SHORT = {"batch_size": ("-b",), "output": ("-o",)}
"""Further flags of a field."""

ELSEWHERE = {
    "--model": "say MODEL without a flag",
    "--checkpoint": "say MODEL without a flag",
    "--input-size": "say --img-size",
    "--amp": "say --dtype bfloat16",
    "--torchcompile": "say --runtimes compiled",
    "--compile": "say --runtimes compiled",
}
"""What to say of flags that are known elsewhere."""


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    text = "a model's speed in every runtime, dense beside sparse"
    parser = commands.add_parser(
        "bench",
        help=text,
        description=f"{text}, in turns. MODEL: {BenchSettings.rules()['model'][1].text}. "
        "`spot bench crossover` measures where sparse attention beats dense attention with a mask.",
        usage="spot bench MODEL [flags]\n       spot bench crossover [flags]",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_flags(parser, GROUPS, SHORT)
    keep_rest(parser, ELSEWHERE)
    parser.set_defaults(run=run, print_help=parser.print_help)
    _dispatch(parser, _crossover_parser())


def _dispatch(parser: argparse.ArgumentParser, crossover: argparse.ArgumentParser) -> None:
    """Has `crossover` parse what comes behind that word."""
    parse = parser.parse_known_args

    def parse_known_args(
        words: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if words and words[0] == "crossover":
            return crossover.parse_known_args(words[1:], namespace)
        return parse(words, namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def settings_of(arguments: argparse.Namespace) -> BenchSettings:
    """The settings of a command line.

    Raises:
        ValueError: with a line for everything that is wrong.
    """
    return flags.settings_of(BenchSettings, arguments, "model")


def run(arguments: argparse.Namespace) -> int:
    """Times a model and prints the tables; help where nothing is given.

    Returns:
        3 where the machine was too busy for ratios, 2 where a setting is wrong, 1 without a
        package.
    """
    given = set(vars(arguments)) & {"words", "problems", *BenchSettings.names()}
    if not any(getattr(arguments, name) for name in given):
        arguments.print_help()
        return 0
    try:
        settings = settings_of(arguments)
    except ValueError as error:
        print(f"spot bench: {error}", file=sys.stderr)
        return 2
    try:
        from spot_vit.bench.report import describe
        from spot_vit.bench.run import bench, contended
        from spot_vit.utils.timing import keep_memory

        keep_memory()
        result = bench(settings, say=lambda text: print(text, file=sys.stderr))
    except ImportError as error:
        hint = "; pip install 'spot-vit[train]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"spot bench: {error}{hint}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"spot bench: {error}", file=sys.stderr)
        return 2
    files = ", ".join(filter(None, (settings.output, result["picture"])))
    print(f"\n{describe(result)}\n\n{result['seconds']:.0f} seconds; written: {files}")
    return 3 if contended(result) else 0


# ---- crossover -----------------------------------------------------------------------------------


def _crossover_parser() -> argparse.ArgumentParser:
    crossover = argparse.ArgumentParser(
        prog="spot bench crossover",
        description="where sparse attention beats dense attention with a mask (a minute)",
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
    crossover.set_defaults(run=run_crossover)
    return crossover


def run_crossover(arguments: argparse.Namespace) -> int:
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
