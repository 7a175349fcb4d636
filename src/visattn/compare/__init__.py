"""Which attention helps on these images, and what does it cost? Plan, trials, results, report."""

from __future__ import annotations

from pathlib import Path

from visattn.compare.settings import Settings
from visattn.errors import require

__all__ = ["Settings", "compare", "estimate", "require_extra"]

NEEDED = ("timm", "torchvision", "lightning", "torchmetrics", "mlxtend", "matplotlib", "jinja2", "safetensors")


def compare(settings: Settings) -> Path:
    """Train the backbone with each mechanism and write the report; the same settings again continue where it stopped.

    Args:
        settings: What to compare, on what, and where to.

    Returns:
        The report, `report.html` in the run folder.

    Raises:
        UserError: A setting, the data or the run folder is not fit, and nothing was written; or a file of the run
            folder cannot be written or read.
    """
    require_extra("visattn compare")
    from visattn.compare import run as engine

    return engine.run(settings)


def estimate(settings: Settings) -> str:
    """Say what `compare` would do: the grid, with estimated time, memory and disk. Trains and writes nothing.

    Args:
        settings: As for `compare`.

    Raises:
        UserError: As for `compare`.
    """
    require_extra("visattn compare")
    from visattn.compare import run as engine

    return engine.estimate(settings)


def require_extra(purpose: str) -> None:
    """Raise `UserError` unless all is installed that trials need; the message names what needs it."""
    for module in NEEDED:
        require(module, extra="compare", purpose=purpose)
