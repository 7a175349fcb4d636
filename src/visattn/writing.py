"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visattn.errors import UserError, one_line

__all__ = ["LOCK", "PARTIAL", "alone", "whole", "writable", "write_json", "write_text"]

LOCK = ".lock"
PARTIAL = ".partial-"  # how the names of files and folders begin that are not whole yet


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The name to write a file by that takes its place when the context ends well; until then an older one stays.

    Raises:
        UserError: It cannot be written.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or one_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    write_text(path, json.dumps(content, indent=1) + "\n")


def writable(path: Path, what: str = "--json") -> Path:
    """The file that a path leads to, asked before any work.

    Args:
        path: Where it is to be written.
        what: The option or argument that the path was given for.

    Raises:
        UserError: It cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder. Give the name of a file for {what}")
        if target.exists() and not target.is_file():  # it would be replaced by a file, /dev/null too
            raise UserError(f"{path} is not a regular file. Give the name of a file for {what}")
        if not target.parent.is_dir():
            raise UserError(f"no such folder: {path.parent}")
        if not os.access(target.parent, os.W_OK):
            raise UserError(f"cannot write into {path.parent}")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from error
    return target


@contextlib.contextmanager
def alone(folder: Path, command: str) -> Iterator[None]:
    """Create a run folder, or open it, and keep other processes out of it while the context lasts.

    Args:
        folder: The folder given as `--out`.
        command: Who writes there, for the message.

    Raises:
        UserError: Another process is writing to it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error.strerror}).") from error
    with lock:
        if not _take(lock.fileno()):
            lock.seek(0)
            raise UserError(
                f"--out {folder}: another {command} (process {lock.read().strip() or '?'}) is writing to it. "
                "Wait for it or use another --out."
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _take(descriptor: int) -> bool:
        """Lock a file; the system unlocks it when the process ends, however it ends."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
