"""The commands behind `visattn`; each parses its options and calls one function of the package."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def visattn() -> None:
    """Vision attention for PyTorch: proven blocks, inserted without loss, compared on your images."""
