"""`spot demo`: demonstrations that need no download, the first one and others by name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spot_vit.utils.errors import UserError
from spot_vit.utils.folders import prepare

OTHERS = {
    "compare": "SPOT, DynamicViT, EViT and random selection at equal cost (up to an hour)",
    "budgets": "one checkpoint for every keep ratio against one for each (up to an hour)",
    "dense": "dense heads on a sparse backbone, by what stands at dropped places (half an hour)",
    "sparsifiner": "dense attention, Sparsifiner's, and Sparsifiner's with SPOT (half an hour)",
}
"""Modules of `spot_vit.demos` besides `first`, and what each shows."""

SEVERAL_SEEDS = ("compare", "budgets", "dense")
OPTIONS = ("quick", "seed", "seeds", "threads")
LIMITS = {"seed": (0, 2**31 - 1), "seeds": (1, 1000), "threads": (1, 1024)}
NEEDED_BYTES = 100_000_000


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
    """Runs the demonstration that is asked for.

    Returns:
        1 where a package is missing, 2 where an option is wrong, 130 where Ctrl-C ended it.
    """
    given = {name: value for name, value in vars(arguments).items() if name in OPTIONS}
    output = getattr(arguments, "output", Path("spot-demo"))
    try:
        _check(given)
        prepare(output, NEEDED_BYTES)
        demo = importlib.import_module(f"spot_vit.demos.{arguments.demo}")
        demo.run(output, **given)
    except ModuleNotFoundError as error:
        hint = "install what the demonstration needs: pip install 'spot-vit[demo]'"
        print(f"spot demo: {error}; {hint}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"spot demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        words = f"finished phases are in {output}, and the same command goes on behind them"
        print(f"\nspot demo: interrupted; {words}", file=sys.stderr)
        return 130
    return 0


def _check(given: Mapping[str, Any]) -> None:
    """Raises UserError, with all that is wrong, before anything is imported or made."""
    problems = [
        f"--{name}: expected {low} to {high}, got {given[name]}"
        for name, (low, high) in LIMITS.items()
        if name in given and not low <= given[name] <= high
    ]
    if problems:
        raise UserError("; ".join(problems))
