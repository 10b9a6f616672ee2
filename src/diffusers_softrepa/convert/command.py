"""The command `softrepa convert`, also `python -m diffusers_softrepa.convert`.

softrepa convert FOLDER_OR_HUB_ID OUTPUT --family sd3
softrepa convert soft_tokens.safetensors OUTPUT --from anima
softrepa convert ADAPTER soft_tokens.safetensors --to anima
"""

import argparse
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..checkpoint import load_checkpoint, save_checkpoint
from ..config import SoftREPAConfig
from ..families.sd3 import SD3
from ..families.unet import UNET
from ..hub import HubOptions
from ..quoting import one_line
from .anima import export_anima, import_anima, read_anima, write_anima
from .reference import TIMESTEP_TOKENS_FILE, TOKENS_FILE, convert_reference, read_reference


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m diffusers_softrepa.convert") -> None:
    """Converts one adapter and prints its tensors. Errors are printed as one sentence, with exit status 2.

    Args:
        arguments: Command-line arguments. Defaults to those of the process.
        prog: Name of the command in messages.
    """
    parser = _parser(prog)
    given = parser.parse_args(arguments)
    given.source_format = given.source_format or ("adapter" if given.target_format == "anima" else "authors")
    try:
        config, tensors = _READERS[given.source_format](given)
        if given.target_format == "anima":
            write_anima(given.output, *export_anima(config, tensors))
        else:
            save_checkpoint(given.output, config, tensors)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error, 1000)}\n")
    for name, tensor in tensors.items():
        print(f"{name}: {tuple(tensor.shape)}, standard deviation {tensor.std().item():.4f}")
    if config.num_timestep_bins is None:
        print(f"{given.source} has no timestep tokens: the adapter has no timestep bins")
    print(f"{config.num_parameters:,} parameters written to {given.output}; {_next_step(given)}")


def _next_step(given: argparse.Namespace) -> str:
    if given.target_format == "anima":
        return "move the file to ComfyUI's models/loras"
    return f'load them with\n    pipe.load_softrepa("{given.output}")'


def _read_authors(given: argparse.Namespace) -> tuple[SoftREPAConfig, dict[str, Tensor]]:
    if given.family is None:
        raise ValueError(
            "the authors' files do not name their model; give --family sd3, or --family unet for SD1.5 and SDXL"
        )
    tensors = read_reference(given.source, _options(given))
    return convert_reference(*tensors, family=given.family, stages=given.stages, base_model=given.base_model)


def _read_anima(given: argparse.Namespace) -> tuple[SoftREPAConfig, dict[str, Tensor]]:
    tensors, _ = read_anima(given.source)
    return import_anima(tensors, num_blocks=given.blocks, base_model=given.base_model)


def _read_adapter(given: argparse.Namespace) -> tuple[SoftREPAConfig, dict[str, Tensor]]:
    return load_checkpoint(given.source, options=_options(given))


_Reader = Callable[[argparse.Namespace], tuple[SoftREPAConfig, dict[str, Tensor]]]
_READERS: Mapping[str, _Reader] = {"authors": _read_authors, "anima": _read_anima, "adapter": _read_adapter}


def _options(given: argparse.Namespace) -> HubOptions:
    return HubOptions(subfolder=given.subfolder, revision=given.revision)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Convert soft tokens from and to the formats of other projects. No pickle code is run.",
    )
    parser.add_argument(
        "source",
        help=f"the authors' files: a folder or Hub repository with {TOKENS_FILE} and, if it has timestep bins, "
        f"{TIMESTEP_TOKENS_FILE}; anima: a safetensors file; adapter: a folder, a file or a Hub repository",
    )
    parser.add_argument("output", help="folder to write the adapter into; with --to anima the file to write")
    parser.add_argument(
        "--from", dest="source_format", choices=tuple(_READERS), help="default: authors; adapter with --to anima"
    )
    parser.add_argument("--to", dest="target_format", choices=("adapter", "anima"), default="adapter")
    parser.add_argument(
        "--family",
        choices=(SD3.name, UNET.name),
        help="required for the authors' files: sd3, or unet for SD1.5 and SDXL",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=UNET.stages,
        help="for UNets, the stages that read the tokens; default: the published ones",
    )
    parser.add_argument(
        "--blocks",
        type=int,
        help="with --from anima, the number of blocks of the denoiser, to get exactly the numbers of the node",
    )
    parser.add_argument("--base-model", help="Hub id of the pipeline that the adapter was trained for")
    parser.add_argument("--subfolder", help="folder inside the Hub repository or the folder")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    return parser
