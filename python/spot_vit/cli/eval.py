"""`spot eval`: how good a model is, at its budgets, beside the dense one, on damaged images."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from spot_vit.config.evaluation import GROUPS, EvaluationSettings
from spot_vit.config.flags import Formatter, add_flags, checked, keep_rest, read_flags
from spot_vit.utils.errors import UserError

SHORT = {
    "data": ("--data-dir",),
    "dataset": ("-d",),
    "batch_size": ("-b",),
    "workers": ("-j",),
    "output": ("--results-file",),
    "compile": ("--torchcompile",),
}
"""Further flags of a field: timm's, where ours has another name."""

ELSEWHERE = {
    "--checkpoint": "say CHECKPOINT without a flag",
    "--pretrained": "say the model's name in place of CHECKPOINT",
    "--input-size": "say --img-size",
    "--crop-mode": "the model's is used",
    "--gp": "say --model-kwargs global_pool=NAME",
    "--metrics-avg": "every class is in the JSON file",
    "--num-gpu": "start it by torchrun",
}
"""What to say of flags that are known elsewhere."""


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    text = "accuracy, cost and speed of a model, at its budgets and beside the dense one"
    parser = commands.add_parser(
        "eval",
        help=text,
        description=f"{text}, in one pass over the images. CHECKPOINT: "
        f"{EvaluationSettings.rules()['checkpoint'][1].text}.",
        usage="spot eval CHECKPOINT [DATA] [flags]",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_flags(parser, GROUPS, SHORT)
    keep_rest(parser, ELSEWHERE)
    parser.set_defaults(run=run)


def settings_of(arguments: argparse.Namespace) -> EvaluationSettings:
    """The settings of a command line.

    Raises:
        ValueError: with a line for everything that is wrong.
    """
    given = dict(vars(arguments))
    words, problems = list(given["words"]), list(given["problems"])
    swallowed = None if "data" in given or len(words) > 1 else "data"
    values, more = read_flags(EvaluationSettings, given, positional=swallowed)
    problems += more
    if "data" in values and "data" not in given:  # the last of a list of values
        words.append(str(values.pop("data")))
    names = ("checkpoint",) if "data" in values else ("checkpoint", "data")
    if len(words) > len(names):
        problems.append(f"expected CHECKPOINT and DATA, got {', '.join(words)}")
    values |= dict(zip(names, words, strict=False))
    return checked(EvaluationSettings.from_dict, values, problems)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, and prints what was found; 2 where a setting is wrong, 1 without a package."""
    try:
        settings = settings_of(arguments)
    except ValueError as error:
        print(f"spot eval: {error}", file=sys.stderr)
        return 2
    try:
        from spot_vit.evaluation.report import describe
        from spot_vit.runs.evaluate import evaluate

        summary = evaluate(settings)
    except ImportError as error:
        hint = "; pip install 'spot-vit[train]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"spot eval: {error}{hint}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"spot eval: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", 0)) == 0:
        files = ", ".join(filter(None, (settings.output, settings.predictions)))
        print(f"\n{describe(summary, settings.per_class)}")
        print(f"\n{summary['seconds']:.0f} seconds; written: {files}")
    return 0
