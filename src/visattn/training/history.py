"""The epochs of a training as files hold them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from visattn.training.trial import Epoch

__all__ = ["as_json", "epochs_table"]


def epochs_table(epochs: Sequence[Epoch]) -> str:
    """CSV, a row for each epoch; of the further scores those that are one number."""
    rows = []
    for epoch in epochs:
        row = asdict(epoch)
        details = row.pop("details")
        rows.append(row | {name: value for name, value in details.items() if not isinstance(value, list)})
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(value: Any) -> Any:
    """Scores as JSON knows them: null where there is no number."""
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
