"""`softrepa info`: prints what an adapter contains and which denoisers it fits.

softrepa info FOLDER_OR_FILE_OR_HUB_ID
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..checkpoint import load_checkpoint
from ..families import built_in_families
from ..hub import HubOptions
from ..quoting import human_bytes, one_line


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="softrepa info",
        description="Prints what an adapter contains and which denoisers it fits. The adapter is checked.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="folder, safetensors file or Hub id of an adapter")
    parser.add_argument("--subfolder", metavar="TEXT", help="folder inside the folder or repository")
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit on the Hub")
    parser.add_argument("--token", metavar="TEXT", help="Hub token; the stored one unless given")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str]) -> None:
    """Prints the contents of an adapter."""
    given = parser().parse_args(argv)
    options = HubOptions(subfolder=given.subfolder, revision=given.revision, token=given.token)
    config, tensors = load_checkpoint(given.source, options=options)
    settings = {name: value for name, value in sorted(config.to_dict().items()) if value is not None}
    denoisers = [spec.denoiser for spec in built_in_families() if spec.name == settings.get("family")]
    numbers: dict[str, dict[str, Any]] = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "mean": round(tensor.float().mean().item(), 6),
            "standard deviation": round(tensor.float().std().item(), 6),
        }
        for name, tensor in tensors.items()
    }
    facts = {"denoisers": denoisers, "parameters": config.num_parameters, "tensors": numbers, "config": settings}
    if given.json:
        print(json.dumps(facts, indent=1, default=str))
        return
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    print(f"{one_line(given.source)}: {config.num_parameters:,} parameters, {human_bytes(size)}")
    print(f"fits: {', '.join(denoisers) or 'the denoisers of a family that is not built in'}")
    for name, number in numbers.items():
        shape = " x ".join(map(str, number["shape"]))
        print(
            f"{name}: {shape} {number['dtype']}, mean {number['mean']:g}, "
            f"standard deviation {number['standard deviation']:g}"
        )
    for name, value in settings.items():
        print(f"{name}: {one_line(value)}")
