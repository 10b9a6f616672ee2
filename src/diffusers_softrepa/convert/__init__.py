"""Conversion of soft tokens from and to the formats of other projects.

- `reference`: reads the `.pth` files of the SoftREPA authors, without running pickle code.
- `anima`: reads and writes the soft-token file of ComfyUI's Anima node.

The command is `softrepa convert` or `python -m diffusers_softrepa.convert`.
"""

from .anima import export_anima, import_anima, read_anima, write_anima
from .command import main
from .reference import TIMESTEP_TOKENS_FILE, TOKENS_FILE, convert_reference, read_reference

__all__ = [
    "TIMESTEP_TOKENS_FILE",
    "TOKENS_FILE",
    "convert_reference",
    "export_anima",
    "import_anima",
    "main",
    "read_anima",
    "read_reference",
    "write_anima",
]
