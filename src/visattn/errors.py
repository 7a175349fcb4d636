"""Errors that are the user's to mend: one line, with the remedy."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType

__all__ = ["UserError", "check", "did_you_mean", "one_line", "plain", "require", "some"]


class UserError(Exception):
    """Something the user can put right; the command line prints it as one line and exits with code 2."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Dotted module name.
        extra: The extra of visattn that installs it.
        purpose: What needs it, for the message.

    Raises:
        UserError: The module is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the module is there, something inside it is broken: that is not a missing extra
        raise UserError(
            f"{purpose} needs {module.split('.')[0]}, which is not installed. "
            f"Install it with: pip install 'visattn[{extra}]'"
        ) from error


def one_line(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def plain(text: str) -> str:
    """Text from elsewhere with line breaks, terminal codes and the like spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(plain, names[:most])) + more


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for a name that is not known: up to three near ones, or what to say where none is near."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"Did you mean {' or '.join(near)}?" if near else otherwise


def check(condition: bool, owner: str, rule: str, *, remedy: str = "", **got: object) -> None:
    """Raise `ValueError("<owner>: <rule>, got <name>=<value>. <remedy>")` unless the condition holds."""
    if not condition:
        values = ", ".join(f"{name}={value!r}" for name, value in got.items())
        raise ValueError(f"{owner}: {rule}, got {values}." + (f" {remedy}" if remedy else ""))
