"""`spot train`: a recipe carried out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spot_vit.config.flags import Formatter, add_flags, checked, keep_rest, read_flags
from spot_vit.config.recipe import GROUPS, Recipe
from spot_vit.config.recipe_files import RUN, read, shipped, to_yaml
from spot_vit.utils.errors import UserError

SHORT = {
    "dataset": ("-d",),
    "data": ("--data-dir",),
    "batch_size": ("-b",),
    "validation_batch_size": ("-vb",),
    "workers": ("-j",),
}
"""Further flags of a field."""

ELSEWHERE = {
    "--kd-model-name": "say --teacher",
    "--distill-loss-weight": "say --kl-weight",
    "--task-loss-weight": "say --ce-weight",
    "--input-size": "say --img-size and --in-chans",
    "--gp": "say --model-kwargs global_pool=NAME",
    "--native-amp": "say --amp",
    "--apex-amp": "say --amp",
    "--no-resume-opt": "say --initial-checkpoint in place of --resume",
    "--start-epoch": "a run goes on where it was by --resume",
    "--local-rank": "torchrun says it in the environment",
    "--torchcompile-mode": "a step compiles in the default mode",
    "--learning-rate": "say --lr",
}
"""What to say of flags that are known elsewhere."""

DIGITS = "digits"
"""The data that need no folder, and the recipe for them."""


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    text = "train a model on your images, dense or sparse"
    parser = commands.add_parser(
        "train",
        help=text,
        description=f"{text}; what decides a run is a recipe: --config, and flags on top of it",
        usage="spot train [DATA] [--config NAME|FILE] [flags]",
        epilog="--no-NAME switches a flag off that a recipe has on; none is no value.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c",
        "--config",
        metavar="NAME|FILE",
        help=f"recipe to start from: a yaml file, or one of {', '.join(shipped())}",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole recipe as yaml, and end"
    )
    add_flags(parser, GROUPS, SHORT)
    parser.add_argument(
        "--torchcompile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="the same as --compile",
    )
    keep_rest(parser, ELSEWHERE)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Trains as flags and recipe say; 2 where they are wrong, 1 where a package is missing."""
    try:
        recipe = recipe_of(arguments)
        text = to_yaml(recipe) if arguments.print_config else None
    except ModuleNotFoundError as error:
        return _missing(error)
    except ValueError as error:
        print(f"spot train: {error}", file=sys.stderr)
        return 2
    if text is not None:
        print(text, end="")
        return 0
    return _carry_out(recipe)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe of a command line: defaults, the recipe named by --config, flags.

    Flags replace what the recipe has, names of a mapping apart: those add to it. Without a recipe
    and a model, digits have the recipe of their name; what goes on has that of its run.

    Raises:
        ValueError: with a line for everything that is wrong.
    """
    given = dict(vars(arguments))
    words, problems = given["words"], list(given["problems"])
    flags, more = read_flags(Recipe, given, positional=None if words or "data" in given else "data")
    problems += more
    data = [str(flags["data"])] if "data" in flags else []
    if len(data + words) > 1:
        problems.append(f"expected one DATA, got {', '.join(data + words)}")
    elif words:
        flags["data"] = words[0]
    if (backend := given["torchcompile"]) is not None:
        flags["compile"] = True
        if backend != "inductor":
            problems.append(f"--torchcompile compiles with inductor, got {backend!r}")
    base: dict[str, Any] = {}
    try:
        base = _base(given["config"], flags)
    except ValueError as error:
        problems.append(str(error))
    if flags.get("dense_epochs") and "teacher" not in flags:
        base["teacher"] = None  # the model that is trained first teaches, not the recipe's
    return checked(Recipe.from_dict, _merged(base, flags), problems)


def _base(config: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that flags stand on."""
    found: dict[str, Any] = {}
    if isinstance(resume := flags.get("resume"), str):
        path = Path(resume)
        folder = path.parent if path.is_file() else path
        found = read(str(folder)) if (folder / RUN).exists() else {}
    if config is not None:
        return found | read(config)
    if not found and flags.get("data", DIGITS) == DIGITS and not {"model", "dataset"} & set(flags):
        return read(DIGITS)
    return found


def _merged(base: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe with flags on top."""
    merged = {**base, **flags}
    for name, value in flags.items():
        below = base.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[name] = below | value
    return merged


def _carry_out(recipe: Recipe) -> int:
    try:
        from spot_vit.runs.stopping import Stopped
        from spot_vit.runs.train import train
        from spot_vit.training.step import NonFiniteStep
    except ModuleNotFoundError as error:
        return _missing(error)
    try:
        train(recipe)
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        who = f" (process {rank})" if rank else ""
        print(f"spot train{who}: {error}", file=sys.stderr)
        return 2
    except NonFiniteStep as error:
        print(f"spot train: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"spot train: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    return 0


def _missing(error: ModuleNotFoundError) -> int:
    hint = "install what training needs: pip install 'spot-vit[train]'"
    print(f"spot train: {error}; {hint}", file=sys.stderr)
    return 1
