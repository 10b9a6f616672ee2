"""`softrepa convert`: converts soft tokens from and to the formats of other programs.

softrepa convert FOLDER_OR_HUB_ID OUTPUT --family sd3
softrepa convert soft_tokens.safetensors OUTPUT --from anima
softrepa convert ADAPTER soft_tokens.safetensors --to anima
"""

from collections.abc import Sequence

from ..convert.command import main as convert


def main(argv: Sequence[str]) -> None:
    """Converts one adapter and prints what it contains."""
    convert(argv, prog="softrepa convert")
