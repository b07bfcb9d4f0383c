"""Reads files of weights: which tensors are in them, under which key, behind which prefixes."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write

State = dict[str, Tensor]

KEYS = ("model", "state_dict", "model_ema", "state_dict_ema", "net")
"""Keys under which training scripts put the weights, in the order in which they are looked for."""

PREFIXES = ("_orig_mod.", "module.", "model.", "backbone.")
"""What wrappers put before names: torch.compile, DDP and EMAs, Lightning, frameworks of tasks."""

_BEFORE = re.compile("(?:" + "|".join(map(re.escape, PREFIXES)) + ")*")

_INSIDE = PREFIXES[0]  # which stands within names too, where blocks are compiled one by one

_LONGEST = 120  # name in messages, characters

_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside its weights

CONVERSION = "conversion"
"""In the metadata of our files: how the model was converted, see `spot_vit.config.conversion`."""

DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError)
"""What readers raise of damaged content, where other errors may be those of a network."""

_NOT_OPENED = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EIO)

logger = logging.getLogger("spot_vit")


class Weights(NamedTuple):
    """Tensors of a checkpoint, and where they were found in it, as text for messages."""

    state: State
    found: str


def read_weights(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any], key: str | None = None
) -> Weights:
    """The tensors of a checkpoint by their names in the model.

    Args:
        checkpoint: a file of `torch.save`, read with `weights_only=True`, or of safetensors; or
            what was read from one.
        key: under which the weights lie; None for the first of `KEYS` that is there, or none.

    Raises:
        ValueError: the file cannot be read, is damaged, is not plain tensors (sparse and quantised
            ones, and those without memory, are none), has no weights under `key`, or numbers that
            are not finite; it is named.
        FileNotFoundError: there is none.
    """
    content: Mapping[str, Any]
    if isinstance(checkpoint, Mapping):
        content, where = checkpoint, "the checkpoint"
    else:
        content, where = _read(Path(checkpoint)), str(checkpoint)
    content, found = _under(content, key, where)
    tensors = {str(name): value for name, value in content.items() if torch.is_tensor(value)}
    if not tensors:
        raise ValueError(f"{where} holds no tensors, only {sorted(map(str, content))}")
    state, prefixes = without_prefixes(tensors)
    if prefixes:
        found.append(f"without the prefix {', '.join(map(repr, prefixes))}")
    state.pop(_COUNTER, None)
    refuse_odd(state, where)
    refuse_non_finite(state, where)
    text = ", ".join(found) or "as it lies there"
    logger.info("%s: %d tensors, %s", where, len(state), text)
    return Weights(state, f"{where}, {text}")


def _under(
    content: Mapping[str, Any], key: str | None, where: str
) -> tuple[Mapping[str, Any], list[str]]:
    """What lies under the keys of training scripts, and words about them."""
    there = [name for name in content if isinstance(content[name], Mapping)]
    if key is not None and key not in there:
        raise ValueError(f"{where} has no weights under key={key!r}; there are {there}")
    found = []
    while name := key or next((name for name in KEYS if name in there), None):
        content, key = content[name], None
        others = [other for other in KEYS if other in there and other != name]
        found.append(f"under {name!r}" + (f" (there are {others} too)" if others else ""))
        there = [name for name in content if isinstance(content[name], Mapping)]
    return content, found


def without_prefixes(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """The tensors without the prefixes of wrappers, however they nest, and which these were.

    Raises:
        ValueError: two tensors would have one name.
    """
    stripped: State = {}
    seen: list[str] = []
    for name, value in state.items():
        short, prefixes = short_name(name)
        seen += [prefix for prefix in prefixes if prefix not in seen]
        if short in stripped:
            raise ValueError(
                f"the checkpoint holds {short} several times, once as {name}: give the part that "
                "is meant, as a dictionary or by key="
            )
        stripped[short] = value
    return stripped, seen


def short_name(name: str) -> tuple[str, list[str]]:
    """The name of a tensor without the prefixes of wrappers, and these."""
    prefixes = [_INSIDE] if _INSIDE in name else []
    short = name.replace(_INSIDE, "")
    before = _BEFORE.match(short)
    assert before is not None  # nothing matches too
    prefixes += sorted((p for p in PREFIXES if p in before[0]), key=before[0].index)
    return short[before.end() :], prefixes


def refuse_odd(state: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError where tensors are not plain: sparse, quantised, or without memory."""
    odd = [
        name
        for name, value in state.items()
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested
    ]
    if odd:
        raise UserError(
            f"{where} holds tensors that are sparse, nested, quantised or without memory in "
            f"{listed(odd)}: write plain ones (to_dense, dequantize)"
        )


def refuse_non_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError where a tensor has NaN or infinite numbers; it is named."""
    if bad := [name for name, value in state.items() if not _finite(value)]:
        raise UserError(
            f"{where} holds NaN or infinite numbers in {listed(bad)}: its training diverged; take "
            "an earlier checkpoint"
        )


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    wide = value.float() if value.element_size() == 1 else value  # float8 has no such test
    return bool(wide.isfinite().all())


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Names in order, the first few of them, and of each as much as fits into a line."""
    ordered = [n if len(n) <= _LONGEST else f"{n[:_LONGEST]}…" for n in sorted(names)]
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"{', '.join(ordered[:limit])}{more}"


def read_safetensors(path: str | os.PathLike[str]) -> State:
    """The tensors of a file of safetensors.

    Raises:
        ValueError: the file is damaged, or something else; it is named.
    """
    with named_in_errors(path):
        return load_file(_readable(path))


def write_safetensors(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Writes tensors as a file of safetensors, atomically.

    Args:
        path: of the file; folders are made.
        state: tensors by name, of any layout; those that share memory are written each in full.
        metadata: texts that stand beside them.

    Raises:
        UserError: the file cannot be written, see `atomic_write`.
    """
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        start = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if start in seen else tensor
        seen.add(start)
    with atomic_write(path) as temporary:
        # Not save_file: it renames by itself, and makes files that only the owner may read.
        temporary.write_bytes(save(tensors, metadata))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of safetensors says besides its tensors, of that which is JSON.

    Raises:
        ValueError: the file is damaged, or something else; it is named.
        FileNotFoundError: there is none.
    """
    with named_in_errors(path), safe_open(_readable(path), "pt") as file:
        texts = file.metadata() or {}
    found = {}
    for name, text in texts.items():
        with suppress(ValueError, RecursionError):  # no JSON, numbers too long, nested too deep
            found[name] = json.loads(text)
    return found


@contextmanager
def named_in_errors(
    path: str | os.PathLike[str], kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """A context in which reading raises UserError that names the file, and why it was not read.

    Whatever a reader stumbles over in a damaged file is one kind of fault. That there is no file
    (FileNotFoundError), or a package is missing, stays as it is.

    Args:
        path: of the file, or another name of it.
        kinds: errors that mean damage, where reading may fail for other reasons too.
    """
    try:
        yield
    except (FileNotFoundError, ImportError, UserError):
        raise
    except kinds as error:
        if isinstance(error, OSError) and error.errno in _NOT_OPENED:
            raise UserError(f"{path} cannot be read: {os.strerror(error.errno)}") from error
        # torch's own text advises to read the file anyway.
        asked = re.search(r"GLOBAL (\S+)", f"{error} {error.__cause__}")
        reason = f"it asks for {asked[1]}" if asked else "it is damaged, or no checkpoint"
        raise UserError(
            f"{path} was not read, and nothing in it was executed: only tensors and plain data are "
            f"accepted, and {reason}"
        ) from error


def _readable(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path, of a file that opens; raises OSError with a number, which readers may not."""
    with open(path, "rb"):
        return path


def refuse_damaged(path: str | os.PathLike[str]) -> None:
    """Raises UserError where a file of `torch.save` has other bytes than were written.

    Torch does not compare the checksums of its tensors. Files of torch before 1.6 have none, nor
    have those of safetensors.
    """
    with named_in_errors(path):
        if zipfile.is_zipfile(_readable(path)):
            with zipfile.ZipFile(path) as records:
                if wrong := records.testzip():
                    raise zlib.error(f"checksum of {wrong}")


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What a file of `torch.save` holds, on the CPU; nothing in it is executed.

    Raises:
        UserError: the file cannot be read, is damaged (see `refuse_damaged`), or holds more than
            tensors and plain data.
        FileNotFoundError: there is none.
    """
    refuse_damaged(path)
    with named_in_errors(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with torch.serialization.safe_globals(_harmless()):
        content = read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _harmless() -> list[Any]:
    """What training scripts put beside the weights: arguments, paths, and scalars of NumPy.

    Each is plain data; files of NumPy 1 name its module otherwise.
    """
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
    named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    paths = [
        (path, f"{module}.{path.__name__}")
        for path in (PosixPath, PurePosixPath)
        for module in ("pathlib", "pathlib._local")
    ]
    return [argparse.Namespace, np.dtype, *dtypes, *named, *paths]
