"""A published file into a safetensors file with our names."""

from __future__ import annotations

import os
from pathlib import Path

from visattn.checkpoints.loading import Loaded, speaking_for
from visattn.checkpoints.matching import LAYOUT, match_alone
from visattn.checkpoints.reading import read
from visattn.errors import UserError, one_line, require, some
from visattn.writing import whole, writable

__all__ = ["convert_file"]

_SOURCE = "visattn.source"


def convert_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Loaded:
    """Write the tensors of a checkpoint under our names, in safetensors, which anything can read safely.

    Args:
        source: As for `load_checkpoint`.
        target: A name that ends in `.safetensors`; a file of that name is replaced when the new one is whole.

    Returns:
        What was found, mapped and dropped. Where it is no published layout, names are kept.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The source is no whole checkpoint of tensors, or of a published layout with more than that.
        UserError: The target cannot be written, or safetensors is not installed.
    """
    path = Path(source)
    if Path(target).suffix != ".safetensors":
        raise UserError(f"convert: the file to write must end in .safetensors, got {target}")
    out = writable(Path(target), "OUT")
    safetensors = require("safetensors", extra="compare", purpose="visattn convert")
    saving = require("safetensors.torch", extra="compare", purpose="visattn convert")
    with speaking_for("convert"):
        content = read(path)
        match = match_alone(content)
        if match.unknown:
            unknown = f"has {len(match.unknown):,} tensors that this layout does not ({some(match.unknown)})"
            raise ValueError(f"the file ({match.layout}) {unknown}, got file={str(path)!r}.")
    if "__metadata__" in match.mapped:  # it would be written, but could not be read
        raise UserError(f"cannot write {target} (safetensors has no tensor named __metadata__)")
    tensors = {name: tensor.contiguous().clone() for name, tensor in match.mapped.items()}  # none may share memory
    layout = content.metadata.get(LAYOUT, match.layout)
    try:
        with whole(out) as partial:
            saving.save_file(tensors, partial, {LAYOUT: layout, _SOURCE: content.metadata.get(_SOURCE, path.name)})
    except (KeyError, UnicodeEncodeError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {target} ({one_line(error)})") from error
    return Loaded(path, match.layout, tuple(match.mapped), tuple(match.dropped), note=match.note)
