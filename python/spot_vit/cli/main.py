"""The command `spot`: what it is made of, and where it starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from spot_vit.cli import bench, demo, eval, export, info, report, show, train
from spot_vit.utils.threads import set_wait_policy

COMMANDS = (train, eval, report, show, export, demo, bench, info)
"""Modules with `add_parser(commands)`; importing them imports neither torch nor timm."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what it parses has `run(arguments)`."""
    made = argparse.ArgumentParser(prog="spot", description="Vision Transformers made sparse.")
    made.add_argument("--version", action="version", version=f"spot-vit {version('spot-vit')}")
    commands = made.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status.

    Returns:
        What the command gives; 130 where Ctrl-C ended it; 2 where a file or folder that none of
        its parts spoke of is not this user's to read or write.
    """
    set_wait_policy()
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("spot: interrupted", file=sys.stderr)
        return 130
    except PermissionError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"spot: {where}{error.strerror}; change its permissions", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
