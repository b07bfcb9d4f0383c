"""`python -m spot_ext.info`: what was built, what was loaded or why not, where kernels exist."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from typing import Any

import torch

import spot_ext
from spot_ext import _library

_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def _distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torchvision() -> str:
    """Whether torchvision fits torch; a wrong one breaks timm's import with an unclear error."""
    version = _distribution("torchvision")
    if version is None:
        return "not installed (only timm needs it)"
    try:
        importlib.import_module("torchvision")
    except Exception as cause:  # whatever a broken binary raises is the diagnosis
        wanted = [
            requirement
            for requirement in importlib.metadata.requires("torchvision") or []
            if re.match(r"torch\b(?!vision)", requirement)
        ]
        first = str(cause).strip().split("\n")[0]
        return (
            f"{version} does NOT work with torch {torch.__version__} (it wants "
            f"{', '.join(wanted) or 'another torch'}): {first}. "
            "Install the pair that belongs together, e.g. pip install --upgrade torch torchvision"
        )
    return f"{version} (fits torch)"


def _ops() -> dict[str, list[str]]:
    """Devices on which each op has a kernel."""
    if _library.error is not None:
        return {}
    names = sorted(
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("spot::")
    )
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name: [device for device, key in _KEYS.items() if has(f"spot::{name}", key)]
        for name in names
    }


def collect() -> dict[str, Any]:
    """Everything the report prints, as plain data."""
    facts: dict[str, Any] = {
        "spot": spot_ext.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "timm": _distribution("timm"),
        "torchvision": _torchvision(),
        "loaded": [str(path) for path in _library.loaded],
        "error": None if _library.error is None else str(_library.error),
        "cuda_error": _library.cuda_error,
        "ops": _ops(),
    }
    if _library.error is None:
        from spot_ext import _C

        facts["build"] = dict(_C.build_info())
        facts["isa"] = _C.isa()
        facts["isas_usable"] = _C.isas()
        forced = os.environ.get("SPOT_ISA")
        if forced and forced not in _C.isas():
            facts["isa_note"] = (
                f"SPOT_ISA={forced} is unknown or unusable here: every op on the CPU refuses to run"
            )
    return facts


def report(facts: dict[str, Any]) -> str:
    """The facts as lines to read."""
    lines = [
        f"SPOT {facts['spot']} · Python {facts['python']} · {facts['platform']}",
        f"torch        {facts['torch']}, CUDA {facts['torch_cuda'] or 'none'}, "
        f"GPU {facts['gpu'] or 'none seen'}",
        f"timm         {facts['timm'] or 'not installed (pip install spot-vit[models])'}",
        f"torchvision  {facts['torchvision']}",
    ]
    if build := facts.get("build"):
        lines += [
            f"built        {build['version']} by {build['compiler']} ({build['build_type']}), "
            f"headers of torch {build['torch_headers']}, runs on torch >= {build['torch_target']}",
            f"CPU kernels  {facts['isa']} in use; built {', '.join(build['isas'])}; usable here "
            f"{', '.join(facts['isas_usable'])}",
            f"CUDA kernels {'CUDA ' + build['cuda'] if build['cuda'] else 'not built'}"
            + (f" for {', '.join(build['cuda_archs'])}" if build["cuda_archs"] else ""),
        ]
    if note := facts.get("isa_note"):
        lines.append(f"note         {note}")
    lines += [f"loaded       {path}" for path in facts["loaded"]]
    if facts["error"]:
        lines.append("NOT LOADED   " + facts["error"].replace("\n", "\n             "))
    elif facts["cuda_error"]:
        lines.append(f"no CUDA      {facts['cuda_error']}")
    if facts["ops"]:
        width = max(map(len, facts["ops"]))
        lines.append("kernels")
        lines += [f"  {op:<{width}}  {', '.join(on)}" for op, on in facts["ops"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the report (`--json`: as JSON); exit status 1 when the library did not load."""
    facts = collect()
    arguments = sys.argv[1:] if argv is None else argv
    print(json.dumps(facts, indent=2) if "--json" in arguments else report(facts))
    return 1 if facts["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
