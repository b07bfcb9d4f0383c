"""The command `spot`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="spot", description="Vision Transformers made sparse.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="train a small ViT, make it sparse, and compare the two (minutes, on a CPU)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output", type=Path, default=Path("spot-demo"), help="folder for the files")
    demo.add_argument("--quick", action="store_true", help="seconds instead of minutes, no result")
    kind = demo.add_mutually_exclusive_group()
    kind.add_argument(
        "--compare",
        action="store_true",
        help="instead: SPOT, DynamicViT, EViT and random selection at equal cost (up to an hour)",
    )
    kind.add_argument(
        "--budgets",
        action="store_true",
        help="instead: one checkpoint for every keep ratio against one for each (up to an hour)",
    )
    kind.add_argument(
        "--sparsifiner",
        action="store_true",
        help="instead: dense attention, Sparsifiner's, and Sparsifiner's with SPOT (half an hour)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of everything random in training")
    demo.add_argument(
        "--seeds", type=int, default=3, help="how many of them --compare and --budgets run"
    )
    demo.add_argument("--threads", type=int, default=2, help="CPU threads to use")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measurements of this machine")
    benches = bench.add_subparsers(required=True, metavar="what")
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
    crossover.set_defaults(run=_crossover)

    info = commands.add_parser("info", help="what is installed, built and loaded")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    try:
        kinds = {
            "compare": arguments.compare,
            "many_budgets": arguments.budgets,
            "sparsifiner_demo": arguments.sparsifiner,
        }
        name = next((name for name, asked in kinds.items() if asked), "demo")
        several = {"seeds": arguments.seeds} if name in ("compare", "many_budgets") else {}
        importlib.import_module(f"spot_vit.{name}").run(
            arguments.output,
            quick=arguments.quick,
            seed=arguments.seed,
            threads=arguments.threads,
            **several,
        )
    except ModuleNotFoundError as error:
        hint = "install what the demonstration needs: pip install 'spot-vit[demo]'"
        print(f"spot demo: {error}; {hint}", file=sys.stderr)
        return 1
    return 0


def _crossover(arguments: argparse.Namespace) -> int:
    from spot_vit import crossover

    sizes = arguments.tokens or crossover.SIZES
    if unknown := sorted(set(sizes) - set(crossover.SIZES)):
        print(f"spot bench: no column of {unknown} tokens; there are {crossover.SIZES}")
        return 2
    crossover.run(
        arguments.output,
        device=arguments.device,
        dtypes=arguments.dtype,
        sizes=sizes,
        threads=arguments.threads,
    )
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from spot_ext.info import main

    return main(["--json"] if arguments.json else [])


if __name__ == "__main__":
    sys.exit(main())
