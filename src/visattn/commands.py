"""The commands behind `visattn`; each parses its options and calls one function of the package."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from visattn.errors import UserError
from visattn.registry import ROLES, list_blocks, resolve

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def visattn() -> None:
    """Vision attention for PyTorch: proven blocks, inserted without loss, compared on your images."""


@app.command("list")
def list_command(
    role: Annotated[str | None, typer.Option(help=f"One of: {', '.join(ROLES)}.")] = None,
) -> None:
    """List the blocks: names for `create` and `insert`, aliases, role and paper."""
    try:
        names = list_blocks(role)
    except ValueError as error:
        raise UserError(str(error)) from error
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "aliases", "role", "arXiv", "mechanism"):
        table.add_column(column, no_wrap=column != "mechanism")
    for name in names:
        card = resolve(name)
        table.add_row(name, ", ".join(card.aliases), card.role, card.paper.rsplit("/", 1)[-1], card.title)
    Console().print(table)
