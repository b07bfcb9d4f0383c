"""`export_model`: a model as a file that appears under its name when it is known to be right."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spot_vit.config.export import OPSET
from spot_vit.config.fields import near_names
from spot_vit.export.formats import ENDINGS, FORMATS, available
from spot_vit.export.metadata import describe, size_for
from spot_vit.export.program import Outputs, as_tuple, check_model, operators_in, program_of
from spot_vit.export.verify import verify as verified
from spot_vit.export.writers import write
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write
from spot_vit.utils.modes import unwrap


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str,
    *,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    opset: int = OPSET,
    verify: bool = True,
    force: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> Path:
    """Writes a model, at its present budget, as a file that runs without `spot_vit`.

    The file takes any number of images and gives logits [B, classes] and, for each decision, the
    patches that stay: [B, n] int64 ascending positions on the grid. It appears under its name
    only when a process without `spot_vit` has found it to give what the model gives.

    Args:
        model: dense or converted, wrapped or not; on the CPU, float32, in eval mode.
        path: of the file; folders are made. Its name ends in .pt2, .onnx or .xml (beside which
            OpenVINO has its .bin).
        format: "torch" (torch.export), "aoti" (AOTInductor), "onnx" or "openvino".
        image_size: side of the images; by default what the model was built for.
        classes: names of the classes; by default those the model came with.
        data_config: what differs from the preprocessing that the model came with.
        batch_size: images in a batch that compiled code is tuned for.
        opset: of ONNX, 20 or more, for "onnx" and "openvino".
        verify: False takes the file as it comes.
        force: replace a file of that name.
        say: is told each step, and what it found.

    Returns:
        The path.

    Raises:
        UserError: the format cannot be made here or the model not exported, the file is there
            already or cannot be written, or it does not give what the model gives.
    """
    target = Path(path)
    check_target(target, format, force)
    if reason := available()[format]:
        raise UserError(f"format {format!r} cannot be made here: {reason}")
    model = unwrap(model)
    check_model(model)
    size = size_for(model, image_size)
    images = torch.zeros(max(batch_size, 2), *size)
    say("tracing the model")
    program = program_of(model, images)
    metadata = describe(
        model,
        format,
        _shapes(model, images),
        operators_in(program),
        size=size,
        classes=classes,
        data_config=data_config,
        opset=opset if format in ("onnx", "openvino") else None,
    )
    with _Folder() as folder:
        made = Path(folder) / f"model{ENDINGS[format]}"
        say(f"writing {format}")
        write(program, made, metadata)
        if verify:
            say("verifying it")
            largest = verified(model, made, size)
            say(f"verified: decisions identical, logits within {largest:.1e}")
        _install(made, target)
    return target


def check_target(path: Path, format: str, force: bool = False) -> None:
    """Raises a UserError unless a file of the format may be written to `path`."""
    if format not in FORMATS:
        raise UserError(
            f"format: expected one of {', '.join(FORMATS)}, got {format!r}"
            f"{near_names(format, FORMATS)}"
        )
    ending = ENDINGS[format]
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it that ends in {ending}")
    if path.suffix != ending:
        raise UserError(f"{path}: the name of a file of format {format!r} ends in {ending}")
    there = [one for one in files_of(path) if one.exists()]
    if there and not force:
        raise UserError(f"{there[-1]} is there already; choose another name, or replace it (force)")


def files_of(path: Path) -> list[Path]:
    """The files that an exported model consists of; the one that names it is the last."""
    return [path.with_suffix(".bin"), path] if path.suffix == ".xml" else [path]


@torch.no_grad()
def _shapes(model: nn.Module, images: Tensor) -> list[list[int | str]]:
    """Of the outputs, with "batch" for the number of images."""
    return [["batch", *output.shape[1:]] for output in as_tuple(Outputs(model)(images[:1]))]


def _install(made: Path, target: Path) -> None:
    """Puts what was made under its name, whole or not at all."""
    if target.suffix == ".xml":  # or an old one would stand beside new weights for a moment
        target.unlink(missing_ok=True)
    for source, goal in zip(files_of(made), files_of(target), strict=True):
        with (
            atomic_write(goal) as temporary,
            source.open("rb") as made_file,
            temporary.open("wb") as new_file,
        ):
            shutil.copyfileobj(made_file, new_file, 2**20)


class _Folder(tempfile.TemporaryDirectory[str]):
    """A temporary folder; that it is full is said in words."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch's writer
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            where = tempfile.gettempdir()
            raise UserError(
                f"{where} is full: make room there, or name another folder in TMPDIR"
            ) from error
