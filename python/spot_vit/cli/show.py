"""`spot show`: what a model keeps of a photo, as a picture in this folder."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from spot_vit.utils.errors import UserError


def add_parser(commands: Any) -> None:
    """Adds the command to those of `spot`."""
    text = "what a sparse model keeps of photos, as one picture"
    parser = commands.add_parser("show", help=text, description=text)
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="files, or folders of pictures")
    parser.add_argument(
        "--model", required=True, metavar="NAME|CHECKPOINT",
        help="a saved model, a run's folder, or timm's name",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", default="kept.png", help="picture to write (.png, .svg or .pdf)"
    )
    parser.add_argument("--keep", type=float, help="share of tokens (the model's)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draws the picture and says what the model said; 2 where something named is wrong."""
    try:
        from spot_vit.report.show import show
        from spot_vit.report.views import answer
        from spot_vit.runs.sparse import load_sparse

        model, note = load_sparse(arguments.model, arguments.keep)
        if note:
            print(f"spot show: {note}", file=sys.stderr)
        found = show(model, arguments.photos, arguments.output)
    except UserError as error:
        print(f"spot show: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        hint = "; pip install 'spot-vit[train]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"spot show: {error}{hint}", file=sys.stderr)
        return 1
    for one in found.images:
        said, dense = (answer(found.model, logits) for logits in (one.logits, one.dense_logits))
        patches = found.model.grid[0] * found.model.grid[1]  # fused tokens have higher positions
        kept = (int((stage.kept & (stage.position < patches)).sum()) for stage in one.stages)
        counts = " -> ".join(map(str, kept))
        print(
            f"{one.name}: {said.name} {said.percent} (dense: {dense.name} {dense.percent}); "
            f"patches kept: {counts}"
        )
    print(f"written: {arguments.output}")
    return 0
