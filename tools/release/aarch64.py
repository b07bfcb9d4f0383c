"""The CPU library built for AArch64 and run under emulation: NEON in place of AVX.

    python tools/release/aarch64.py --folder ~/aarch64
    python tools/release/aarch64.py --folder ~/aarch64 tests/ops/compact -k gradients

Needs Debian's `g++-aarch64-linux-gnu` and `qemu-user`, and CMake, Ninja and pybind11 in this
Python. `--folder` is filled once (5 GB: Debian's CPython for AArch64, torch and what it needs) and
used again. Then `tools/release/smoke.py` runs, and some samples of every op beside its definition,
values and gradients, or the tests that are named, with pytest's own options.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from copies import ROOT, built, copied

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
DEBIAN = [
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libstdc++6",
    "libgcc-s1", "libgomp1", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5",
    "libsqlite3-0", "libuuid1", "libcrypt1", "libncursesw6", "libtinfo6", "libreadline8", "libnsl2",
    "libtirpc3",
]  # fmt: skip
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 37)] + ["manylinux2014_aarch64"]
SAMPLE = [
    "tests/ops/generic/test_values.py", "-k",
    "cpu and (shuffled or odd_sizes or residual or five_prefix or padded or moments or threshold)",
]  # fmt: skip


def sysroot(folder: Path) -> Path:
    """Debian's CPython 3.11 and its libraries for AArch64, unpacked and not installed."""
    root = folder / "root"
    if root.exists():
        return root
    apt = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial", "packages"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "conf").write_text(
        'APT::Architecture "arm64";\nAPT::Architectures { "arm64"; };\n'
        f'Dir::State::lists "{apt}/lists";\nDir::State::status "/dev/null";\n'
        f'Dir::Cache "{apt}/cache";\nAPT::Sandbox::User "";\n'
    )
    env = os.environ | {"APT_CONFIG": str(apt / "conf")}
    subprocess.run(["apt-get", "-qq", "update"], check=True, env=env)
    subprocess.run(
        ["apt-get", "-qq", "download", *DEBIAN], check=True, env=env, cwd=apt / "packages"
    )
    part = folder / "root.part"
    for package in (apt / "packages").glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, part], check=True)
    return part.rename(root)


def packages(folder: Path, torch: str) -> Path:
    """What the tests import, torch with it, as wheels for AArch64 have them."""
    site = folder / f"site-{torch}"
    if site.exists():
        return site
    part = folder / f"site-{torch}.part"
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", part,
         "--only-binary=:all:", "--python-version=3.11", "--implementation=cp", *platforms,
         f"torch=={torch}", "numpy", "pytest>=8", "hypothesis>=6.100"],
        check=True,
    )  # fmt: skip
    return part.rename(site)


def build(folder: Path, site: Path) -> Path:
    """A copy of packages and tests in `folder`, with libraries for AArch64; where it is."""
    shutil.rmtree(folder / "copy", ignore_errors=True)
    copy = copied(folder)
    built(
        folder, copy,
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
        f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
        "-DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so",
        torch=site / "torch",
    )  # fmt: skip
    return copy


def main() -> int:
    """Builds, then runs the smoke test and the sample; the exit status is the last failure's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--torch", default="2.11.0")
    given, chosen = parser.parse_known_args()
    if sys.version_info[:2] != (3, 11):
        parser.error("needs CPython 3.11 here: headers of the Python that Debian has for AArch64")
    if missing := [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]:
        parser.error(f"not found: {', '.join(missing)}")
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    root, site = sysroot(folder), packages(folder, given.torch)
    copy = build(folder, site)
    python = [EMULATOR, "-L", root, root / "usr/bin/python3.11"]
    env = os.environ | {
        "PYTHONPATH": f"{copy}:{copy / 'python'}:{site}", "PYTHONHOME": str(root / "usr"),
        "OMP_NUM_THREADS": "2", "SPOT_ISA": "baseline", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    for variable in ("VIRTUAL_ENV", "LD_PRELOAD"):
        env.pop(variable, None)
    status = 0
    for command in (
        [ROOT / "tools/release/smoke.py"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(chosen or SAMPLE)],
    ):
        start = time.monotonic()
        done = subprocess.run([*python, *command], cwd=copy, env=env)
        print(f"exit status {done.returncode} after {time.monotonic() - start:.0f} s", flush=True)
        status = done.returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main())
