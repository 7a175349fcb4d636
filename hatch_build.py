"""Compiles the kernels of visattn.native where there is a C compiler; without one the package is pure Python."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "src" / "visattn" / "native"
TARGET = SOURCE / "kernels.so"
# Contractions (a * b + c in one step) are what these kernels are for; no other liberty with arithmetic is taken.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
MACHINES = {"x86_64": ["-march=x86-64-v3"], "aarch64": []}


def build() -> bool:
    """Compile; whether there is a library now."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    machine = platform.machine()
    TARGET.unlink(missing_ok=True)
    if sys.platform != "linux" or machine not in MACHINES or shutil.which(compiler[0]) is None:
        return False
    new = TARGET.with_suffix(".new")
    files = sorted(str(file) for file in SOURCE.glob("*.c"))
    done = subprocess.run([*compiler, *FLAGS, *MACHINES[machine], *files, "-o", str(new), "-lm"], check=False)
    if done.returncode != 0:
        return False
    new.replace(TARGET)
    return True


if __name__ == "__main__":
    sys.exit(0 if build() else "visattn.native was not compiled")
