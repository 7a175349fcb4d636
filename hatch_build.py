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
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run by hand
    BuildHookInterface = object

SOURCE = Path(__file__).parent / "src" / "visattn" / "native"
TARGET = SOURCE / "kernels.so"
# Contractions (a * b + c in one step) are what these kernels are for; no other liberty with arithmetic is taken.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
FLAGS += ["-falign-loops=64"]  # the inner loops of products then fill two cache lines, not three
MACHINES = {"x86_64": ["-mavx2", "-mfma"], "aarch64": []}


def build(target: Path) -> str:
    """Compile; "", or why there is no library."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        return f"the kernels are for Linux on {' and '.join(MACHINES)}"
    if shutil.which(compiler[0]) is None:
        return f"there is no C compiler {compiler[0]!r}"
    checksum = 0  # by which visattn.native knows that the library is of these sources
    for file in sorted((*SOURCE.glob("*.c"), *SOURCE.glob("*.h"))):
        checksum = zlib.crc32(file.read_bytes(), checksum)
    more = shlex.split(os.environ.get("CFLAGS", ""))
    flags = [*FLAGS, *MACHINES[machine], f"-DSOURCES={checksum}u", *more]
    with tempfile.TemporaryDirectory() as folder:
        objects, commands = [], []
        for source in sorted(SOURCE.glob("*.c")):
            for real in ("float", "double"):
                objects.append(f"{folder}/{source.stem}-{real}.o")
                # What is there to be proven may be slow: at full length these sums take minutes to compile.
                defined = ["-DDOUBLE", "-O1"] if real == "double" else []
                commands.append([*compiler, *flags, *defined, "-c", str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(lambda command: subprocess.run(command, check=False).returncode, commands))
        # Threads are called by the names that torch's own library has, which is found when ours is loaded.
        linked = f"{folder}/{TARGET.name}"
        if (
            any(done)
            or subprocess.run([*compiler, *more, "-shared", *objects, "-o", linked, "-lm"], check=False).returncode
        ):
            return f"{shlex.join(compiler)} did not compile the kernels"
        new = target.with_name(f"{target.name}.{os.getpid()}.new")
        shutil.copyfile(linked, new)
        new.replace(target)  # whole or not at all: another process may load it at this moment
    return ""


class Kernels(BuildHookInterface):
    """Puts the library into wheels, which are then for one platform; an editable install has it in the checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected."""
        editable = version == "editable"
        if not editable:
            self.folder = tempfile.TemporaryDirectory()
        target = TARGET if editable else Path(self.folder.name) / TARGET.name
        missing = build(target)
        if missing:
            self.app.display_warning(f"visattn: {missing}, so that torch's operations serve alone")
            return
        if not editable:
            build_data["force_include"][str(target)] = f"visattn/native/{TARGET.name}"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Clean up."""
        if version != "editable":
            self.folder.cleanup()


if __name__ == "__main__":
    sys.exit(build(TARGET) or 0)
