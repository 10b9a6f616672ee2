"""Foreign formats, in and out; the only room that spells their names, and no other room imports it.

- `reference`: the authors' published `.pth` files, in, without running any pickle code.
- `anima`: the soft-token file that ComfyUI's Anima node reads, in and out.

On the command line: `python -m diffusers_softrepa.convert --help`.
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
