"""The kinds of files: how they are called, and what making and running them takes."""

from __future__ import annotations

from importlib.util import find_spec

from spot_vit.config.export import FORMATS

__all__ = ["ENDINGS", "FORMATS", "available"]

ENDINGS = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
"""How names of the files end; beside OpenVINO's .xml stands its .bin."""

_PACKAGES = {
    "torch": (),
    "aoti": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


def available() -> dict[str, str | None]:
    """For each format None if its files can be made and run here, else the reason in words."""
    return {name: _missing(name) for name in FORMATS}


def _missing(name: str) -> str | None:
    lacking = [package for package in _PACKAGES[name] if find_spec(package) is None]
    if lacking:
        cure = "pip install 'spot-vit[export]'"
        return f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed: {cure}"
    return _no_compiler() if name == "aoti" else None


def _no_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "no C++ compiler was found: install g++ or clang++, or name one in CXX"
    return None
