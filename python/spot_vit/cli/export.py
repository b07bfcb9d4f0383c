"""`spot export`: a model as a file that runs without this package."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from spot_vit.config import flags
from spot_vit.config.export import GROUPS, ExportSettings
from spot_vit.config.flags import Formatter, add_flags, keep_rest
from spot_vit.utils.errors import UserError

SHORT = {"output": ("-o",), "batch_size": ("-b",)}
"""Further flags of a field."""

ELSEWHERE = {
    "--checkpoint": "say CHECKPOINT without a flag",
    "--pretrained": "say the model's name in place of CHECKPOINT",
    "--input-size": "say --img-size",
}
"""What to say of flags that are known elsewhere."""


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    text = "a model as a file of torch.export, AOTInductor, ONNX or OpenVINO"
    parser = commands.add_parser(
        "export",
        help=text,
        description=f"{text}, verified before it appears. CHECKPOINT: "
        f"{ExportSettings.rules()['checkpoint'][1].text}.",
        usage="spot export CHECKPOINT --format FORMAT [flags]",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_flags(parser, GROUPS, SHORT)
    keep_rest(parser, ELSEWHERE)
    parser.set_defaults(run=run)


def settings_of(arguments: argparse.Namespace) -> ExportSettings:
    """The settings of a command line.

    Raises:
        ValueError: with a line for everything that is wrong.
    """
    return flags.settings_of(ExportSettings, arguments, "checkpoint")


def run(arguments: argparse.Namespace) -> int:
    """Exports, and says what the file needs; 2 where a setting is wrong, 1 without a package."""
    try:
        settings = settings_of(arguments)
    except ValueError as error:
        print(f"spot export: {error}", file=sys.stderr)
        return 2
    try:
        from spot_vit.runs.exporting import describe, export_checkpoint

        found = export_checkpoint(settings, say=lambda text: print(text, file=sys.stderr))
    except UserError as error:
        print(f"spot export: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        hint = "; pip install 'spot-vit[export]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"spot export: {error}{hint}", file=sys.stderr)
        return 1
    print(describe(found))
    return 0
