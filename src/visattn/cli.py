"""The command line: one thin command per capability."""

from __future__ import annotations

import sys

from visattn.errors import UserError, one_line, plain, require

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user can mend becomes one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        typer = require("typer", extra="compare", purpose="the command line")
        require("rich", extra="compare", purpose="the command line")
        from visattn.commands import app

        usage_error: type[Exception] = getattr(typer, "TyperException", None) or _click_exception()
        try:
            status = app(arguments or ["--help"], standalone_mode=False, prog_name="visattn")
        except usage_error as error:
            said = error.format_message()  # type: ignore[attr-defined]  # both classes have it
            raise UserError(f"{said if said.endswith(('.', '?')) else f'{said}.'} See visattn --help.") from error
        except typer.Abort:
            status = 130
    except UserError as error:
        if "--debug" in arguments:
            raise
        print(f"visattn: {plain(one_line(error))}", file=sys.stderr)
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def _click_exception() -> type[Exception]:
    """What older versions of typer raise."""
    exception: type[Exception] = require("click", extra="compare", purpose="the command line").ClickException
    return exception
