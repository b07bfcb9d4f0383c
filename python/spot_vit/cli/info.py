"""`spot info`: what is installed, built and loaded."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    parser = commands.add_parser("info", help="what is installed, built and loaded")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the facts that `python -m spot_ext.info` prints."""
    from spot_ext.info import main

    return main(["--json"] if arguments.json else [])
