"""Published code and its files -> our blocks and networks.

`build` and `convert` work on single blocks: a published class with its arguments, a state dict of it. `load_checkpoint`
and `convert_file` work on files, of blocks and of whole networks, and find out by themselves what they are.
"""

from visattn.checkpoints.converting import convert_file
from visattn.checkpoints.loading import Loaded, load_checkpoint
from visattn.checkpoints.published import PUBLISHED, Published, build, convert, find

__all__ = ["PUBLISHED", "Loaded", "Published", "build", "convert", "convert_file", "find", "load_checkpoint"]
