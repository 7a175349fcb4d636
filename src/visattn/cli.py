"""The command line: one thin command per capability."""

from __future__ import annotations

import sys

from visattn.errors import UserError, require

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a `UserError` becomes one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        require("typer", extra="compare", purpose="the command line")
        require("rich", extra="compare", purpose="the command line")
        from visattn.commands import app

        app(arguments, standalone_mode=True)
    except UserError as error:
        if "--debug" in arguments:
            raise
        print(f"visattn: {error}", file=sys.stderr)
        sys.exit(2)
