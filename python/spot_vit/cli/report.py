"""`spot report`: one offline page of what a model keeps of pictures, what leaves, and why."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from spot_vit.config.flags import Formatter, add_flags, checked, keep_rest, read_flags
from spot_vit.config.report import GROUPS, ReportSettings
from spot_vit.utils.errors import UserError

SHORT = {"output": ("-o",)}
"""Further flags of a field."""

ELSEWHERE = {
    "--model": "say CHECKPOINT without a flag",
    "--checkpoint": "say CHECKPOINT without a flag",
    "--images": "say them behind CHECKPOINT, without a flag",
}
"""What to say of flags that are known elsewhere."""


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    text = "one offline page: what a model keeps of pictures, what leaves, and why"
    parser = commands.add_parser(
        "report",
        help=text,
        description=f"{text}. CHECKPOINT: {ReportSettings.rules()['checkpoint'][1].text}. "
        f"IMAGES: {ReportSettings.rules()['images'][1].text}.",
        usage="spot report CHECKPOINT IMAGES... [flags]\n       spot report --data TRACE [flags]",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_flags(parser, GROUPS, SHORT)
    keep_rest(parser, ELSEWHERE)
    parser.set_defaults(run=run)


def settings_of(arguments: argparse.Namespace) -> ReportSettings:
    """The settings of a command line.

    Raises:
        ValueError: with a line for everything that is wrong.
    """
    given = dict(vars(arguments))
    words, problems = list(given["words"]), list(given["problems"])
    values, more = read_flags(ReportSettings, given)
    if words:
        values |= {"checkpoint": words[0], "images": tuple(words[1:]) or None}
    return checked(ReportSettings.from_dict, values, problems + more)


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and says where; 2 where a setting is wrong, 1 without a package."""
    try:
        settings = settings_of(arguments)
    except ValueError as error:
        print(f"spot report: {error}", file=sys.stderr)
        return 2
    try:
        from spot_vit.report.make import make_report

        command = shlex.join(["spot", *sys.argv[1:]])
        files = make_report(settings, command, say=lambda text: print(text, file=sys.stderr))
    except UserError as error:
        print(f"spot report: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        hint = "; pip install 'spot-vit[train]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"spot report: {error}{hint}", file=sys.stderr)
        return 1
    page, *rest = files
    more = f" and {len(rest)} files beside it" if rest else ""
    print(f"written: {page} ({page.stat().st_size / 1e6:.1f} MB){more}; open it in a browser")
    return 0
