"""Compiles the kernels of visattn.native where there is a C compiler; without one the package is pure Python."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path(__file__).parent / "src" / "visattn" / "native"
TARGET = SOURCE / "kernels.so"
# Contractions (a * b + c in one step) are what these kernels are for; no other liberty with arithmetic is taken.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
MACHINES = {"x86_64": ["-march=x86-64-v3"], "aarch64": []}


def build() -> bool:
    """Compile; whether there is a library now."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    machine = platform.machine()
    TARGET.unlink(missing_ok=True)
    if sys.platform != "linux" or machine not in MACHINES or shutil.which(compiler[0]) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in sorted(SOURCE.glob("*.c")):
            for real in ("float", "double"):
                objects.append(f"{folder}/{source.stem}-{real}.o")
                defined = ["-DDOUBLE"] if real == "double" else []
                command = [*compiler, *FLAGS, *MACHINES[machine], *defined, "-c", str(source), "-o", objects[-1]]
                if subprocess.run(command, check=False).returncode != 0:
                    return False
        # Threads are called by the names that torch's own library has, which is found when ours is loaded.
        linked = f"{folder}/{TARGET.name}"
        if subprocess.run([*compiler, "-shared", *objects, "-o", linked, "-lm"], check=False).returncode != 0:
            return False
        shutil.move(linked, TARGET)
    return True


class Kernels(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the library into wheels, which are then for one platform; an editable install has it in the checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected."""
        if build():
            build_data["artifacts"].append(TARGET.relative_to(self.root).as_posix())
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        else:
            self.app.display_warning("visattn: no C compiler for this platform, so torch's operations serve alone")


if __name__ == "__main__":
    sys.exit(0 if build() else "the kernels were not compiled")
