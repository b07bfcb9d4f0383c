"""Runs an exported file with what it needs and nothing of `spot_vit`; also a script that does.

    python standalone.py FILE IMAGES.npz RESULTS.npz

reads batches of images [B, 3, H, W] float32 and writes the file's outputs for each of them. It may
be copied to wherever files are used.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], list[np.ndarray]]
"""From images [B, 3, H, W] float32 to logits [B, classes] and the patches of each decision."""

KEY = "spot_vit"
"""Under which a file has its metadata, as JSON."""


class NotOurs(ValueError):
    """A file that is not there, cannot be read, or was not written by `spot export`."""


class Missing(RuntimeError):
    """What a file needs and is not here, in a sentence with its cure."""


def load(path: Path, threads: int | None = None) -> tuple[Run, dict[str, Any]]:
    """What runs a file, and its metadata.

    Args:
        path: of the file.
        threads: of the CPU; None leaves it to the runtime. torch's are set by torch alone.

    Raises:
        NotOurs: there is no such file, or it is another kind of file.
        Missing: a package, or an operator of `spot_ext`, is not installed.
    """
    if not path.is_file():
        raise NotOurs(f"there is no file {path}; expected one that spot export wrote")
    if path.suffix == ".onnx":
        return _onnx(path, threads)
    if path.suffix == ".xml":
        return _openvino(path, threads)
    if path.suffix == ".pt2":
        return _torch(path)
    raise NotOurs(f"{path}: expected a name that ends in .pt2, .onnx or .xml")


# ---- torch ---------------------------------------------------------------------------------------


def _torch(path: Path) -> tuple[Run, dict[str, Any]]:
    metadata, compiled = _archive(path)
    torch = _package("torch", path)
    _have_operators(path, metadata)
    if compiled:
        module = torch._inductor.aoti_load_package(str(path))
    else:
        module = torch.export.load(path).module()

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            found = module(torch.from_numpy(np.ascontiguousarray(images)))
        outputs = [found] if isinstance(found, torch.Tensor) else found
        return [output.numpy() for output in outputs]

    return run, metadata


def _archive(path: Path) -> tuple[dict[str, Any], bool]:
    """Metadata of a .pt2 file, and whether it holds compiled code."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(f"/extra/{KEY}.json"):
                    return json.loads(archive.read(name)), False
                if "/data/aotinductor/" in name and name.endswith("_metadata.json"):
                    return json.loads(json.loads(archive.read(name))[KEY]), True
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise _not_ours(path) from error
    raise _not_ours(path)


def _have_operators(path: Path, metadata: dict[str, Any]) -> None:
    """Loads the operators that a file calls."""
    import torch

    def lacking() -> list[str]:
        names = (name.partition("::")[2] for name in metadata["operators"])
        return [f"spot::{name}" for name in names if not hasattr(torch.ops.spot, name)]

    if not lacking():
        return
    reason = ""
    try:
        import spot_ext  # noqa: F401
    except ImportError as error:
        reason = f" ({error})"
    if there := lacking():
        raise Missing(
            f"{path} calls {', '.join(there)}, operators of spot_ext {metadata['versions']['spot']}"
            f" that are not loaded here{reason}: pip install -U spot-vit, and import spot_ext"
        )


# ---- other runtimes ------------------------------------------------------------------------------


def _onnx(path: Path, threads: int | None) -> tuple[Run, dict[str, Any]]:
    runtime = _package("onnxruntime", path)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        metadata = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    except (KeyError, ValueError) as error:
        raise _not_ours(path) from error
    except Exception as error:  # of the runtime's own kinds, which have no common base
        raise NotOurs(f"{path} cannot be loaded by ONNX Runtime: {error}") from error
    (given,) = session.get_inputs()

    def run(images: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {given.name: images})

    return run, metadata


def _openvino(path: Path, threads: int | None) -> tuple[Run, dict[str, Any]]:
    openvino = _package("openvino", path)
    # Processors with bfloat16 would compute in it, if nothing were said.
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
    }  # fmt: skip
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    try:
        model = core.read_model(path)
        metadata = json.loads(model.get_rt_info([KEY]).astype(str))
        request = core.compile_model(model, "CPU", options).create_infer_request()
    except (RuntimeError, ValueError) as error:
        raise NotOurs(
            f"{path} cannot be loaded by OpenVINO as a file of spot export: {error}"
        ) from error

    def run(images: np.ndarray) -> list[np.ndarray]:
        request.infer([images])
        return [np.array(output.data) for output in request.output_tensors]

    return run, metadata


# ---- pieces --------------------------------------------------------------------------------------


def _package(name: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{path} is run by {name}: pip install {name} ({error})") from error


def _not_ours(path: Path) -> NotOurs:
    return NotOurs(f"{path} does not say what it is of, as files of spot export do")


def main(path: str, images: str, results: str) -> None:
    """Runs a file on the batches of an .npz file, and writes what it gives to another."""
    run, _ = load(Path(path))
    found = {}
    with np.load(images) as batches:
        for name in batches:
            for number, output in enumerate(run(batches[name])):
                found[f"{name}.{number}"] = output
    if any(name.partition(".")[0] == "spot_vit" for name in sys.modules):
        raise RuntimeError("spot_vit was imported; files are to run without it")
    arrays: Any = found
    np.savez(results, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
