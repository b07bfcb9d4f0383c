"""`spot info`: what is installed, built and loaded, and whether the versions are those needed."""

from __future__ import annotations

import argparse
import json
from typing import Any

from spot_vit.utils.requirements import requirements


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    parser = commands.add_parser("info", help="what is installed, built and loaded")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the facts of `python -m spot_ext.info`, and which versions models need.

    Where torch is missing there are no facts but that one.
    """
    try:
        from spot_ext.info import collect, report
        from spot_vit.nn.packed import packing_report

        facts = collect()
        text = report(facts)
        facts["packed_linear"] = packing_report()
        text += f"\n{'packed':<13}{_packed(facts['packed_linear'])}"
    except ModuleNotFoundError as error:
        facts = {"error": str(error)}
        text = f"{'error':<13}{error}"
    needs = requirements()
    if arguments.json:
        named = {need.name: {**need._asdict(), "met": need.met} for need in needs}
        print(json.dumps({**facts, "needs": named}, indent=2))
    else:
        print(text)
        for need in needs:
            print(f"{'needs' if need.met else 'NOT MET':<13}{need}")
    return 1 if facts["error"] else 0


def _packed(found: dict[str, tuple[str, float]]) -> str:
    """Who multiplies in the linear layers of `fast` on this machine, in words."""
    parts = [f"{dtype} by {kind}, x{ratio:.2f}" for dtype, (kind, ratio) in found.items()]
    return f"linear layers of spot_vit.fast: {'; '.join(parts)} of torch's speed"
