"""`spot demo`: demonstrations that need no download, the first one and others by name."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

OTHERS = {
    "compare": "SPOT, DynamicViT, EViT and random selection at equal cost (up to an hour)",
    "budgets": "one checkpoint for every keep ratio against one for each (up to an hour)",
    "dense": "dense heads on a sparse backbone, by what stands at dropped places (half an hour)",
    "sparsifiner": "dense attention, Sparsifiner's, and Sparsifiner's with SPOT (half an hour)",
}
"""Modules of `spot_vit.demos` besides `first`, and what each shows."""

SEVERAL_SEEDS = ("compare", "budgets", "dense")
OPTIONS = ("quick", "seed", "seeds", "threads")


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    text = "train a small ViT, make it sparse, and compare the two (minutes, on a CPU)"
    parser = commands.add_parser("demo", help=text, description=text)
    _add_options(parser)
    parser.set_defaults(run=run, demo="first")
    others = parser.add_subparsers(metavar="[other]", title="other demonstrations")
    for name, shown in OTHERS.items():
        other = others.add_parser(name, help=shown, description=shown)
        _add_options(other)
        if name in SEVERAL_SEEDS:
            other.add_argument(
                "--seeds", type=int, default=argparse.SUPPRESS, help="how many to run (3)"
            )
        other.set_defaults(demo=name)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what all of them take; suppressed defaults keep what stands before the name of one."""
    absent = argparse.SUPPRESS
    parser.add_argument("--output", type=Path, default=absent, help="folder to write (spot-demo)")
    parser.add_argument(
        "--quick", action="store_true", default=absent, help="seconds instead of minutes, no result"
    )
    parser.add_argument(
        "--seed", type=int, default=absent, help="of everything random in training (0)"
    )
    parser.add_argument("--threads", type=int, default=absent, help="CPU threads to use (2)")


def run(arguments: argparse.Namespace) -> int:
    """Runs the demonstration that is asked for; 1 where a package is missing."""
    given = {name: value for name, value in vars(arguments).items() if name in OPTIONS}
    try:
        demo = importlib.import_module(f"spot_vit.demos.{arguments.demo}")
        demo.run(getattr(arguments, "output", Path("spot-demo")), **given)
    except ModuleNotFoundError as error:
        hint = "install what the demonstration needs: pip install 'spot-vit[demo]'"
        print(f"spot demo: {error}; {hint}", file=sys.stderr)
        return 1
    return 0
