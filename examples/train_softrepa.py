"""Trains soft tokens on your own images.

    accelerate launch examples/train_softrepa.py --pretrained_model_name_or_path MODEL --train_data photos/
    accelerate launch examples/train_softrepa.py settings.yaml
    accelerate launch examples/train_softrepa.py --config settings.yaml --max_steps 100

Settings are those of `ContrastiveFlowMatchingArguments` and the ones below; a YAML or JSON file holds the same names,
and the command line goes before it. `--help` lists them all; `--debug` shows the traceback of an error.

Exit status: 0 when training has finished, or was stopped by SIGTERM and saved a checkpoint; 1 when it failed; 2 when
the settings, the data or the model are not as they should be.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import HfArgumentParser

from diffusers_softrepa import SoftREPAConfig, add_softrepa, load_softrepa
from diffusers_softrepa.conditioning import conditioner_of
from diffusers_softrepa.families import family_of, text_blocks
from diffusers_softrepa.pipeline import denoiser_of
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer, check_run
from diffusers_softrepa.training.arguments import with_new_names
from diffusers_softrepa.training.checkpoints import Checkpoints
from diffusers_softrepa.training.data.dataset import load_rows

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """What to train."""

    pretrained_model_name_or_path: str = field(metadata={"help": "Text-to-image pipeline: Hub id or folder."})
    revision: str | None = option("Branch, tag or commit of it.")
    variant: str | None = option("Variant of its files, such as fp16.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "Precision that it is loaded in. mixed_precision then decides in what denoiser and text encoders train."
    )
    adapter: str | None = option("Train on this adapter, a folder or Hub id, instead of a fresh one.")
    num_tokens: int | None = option("Of a fresh adapter: soft tokens per layer; published number unless given.")
    num_layers: int | None = option("Of a fresh adapter: first text blocks that get tokens, in transformers.")
    stages: list[str] | None = field(
        default=None, metadata={"help": "Of a fresh adapter: stages that see the tokens (down, mid, up), in UNets."}
    )
    num_timestep_bins: int | None = option("Of a fresh adapter: timestep bins; 0 for tokens that ignore the timestep.")
    init: Literal["normal", "text"] = option("Of a fresh adapter: random tokens, or a text's plus noise.", "normal")
    init_text: str = option("Of init=text: the text.", "a high quality picture that shows exactly what was asked for")


@dataclass
class DataArguments:
    """What to learn from."""

    train_data: str = field(
        metadata={"help": "Folder with metadata.jsonl, webdataset shards, or data set on the disk or the Hub."}
    )
    train_split: str = option("Split of a data set that has several.", "train")
    eval_data: str | None = option("Held-out images and captions, likewise.")
    eval_split: str = option("Its split.", "train")
    streaming: bool = option("Read data sets of the Hub as they go, without a copy on the disk.", False)


class Parser(HfArgumentParser):
    """A parser whose errors are ValueErrors, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the settings")


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, ContrastiveFlowMatchingArguments]:
    """Returns the settings of a command line and of the file that it names.

    Raises:
        ValueError: A setting is unknown, missing or out of range, or the file is not YAML or JSON.
        OSError: There is no such file.
    """
    argv = list(argv)
    if len(argv) == 1 and argv[0].endswith(CONFIG_SUFFIXES):
        argv = ["--config", argv[0]]
    classes: Any = (ModelArguments, DataArguments, ContrastiveFlowMatchingArguments)
    usage = "train_softrepa.py [settings.yaml | --config settings.yaml] [--setting value ...]"
    parser = Parser(classes, description=__doc__.split("\n")[0], usage=usage, allow_abbrev=False)
    parser.add_argument("--config", help="YAML or JSON file of settings.")
    known = {action.dest: action for action in parser._actions}
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    file = first.parse_known_args(argv)[0].config
    if file is not None:
        settings = with_new_names(read_settings(Path(file)))
        check_known(settings, set(known) - {"help", "config"}, file)
        for name in settings:
            known[name].required = False
        parser.set_defaults(**settings)  # strings are converted as if they stood on the command line
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    flags = [word for word in unknown if word.startswith("--")] or unknown  # without their values
    check_known([word.lstrip("-").split("=")[0].replace("-", "_") for word in flags], set(known), "the command line")
    return tuple(parsed)


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML or JSON file; None values count as not given."""
    text = path.read_text(encoding="utf-8")
    try:
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings by name, such as `max_steps: 100`, but holds {settings!r:.60}")
    return {name: value for name, value in settings.items() if value is not None}


def check_known(names: Any, known: set[str], where: str) -> None:
    """Raises for names that are no settings, with the ones that may have been meant."""
    unknown = [name for name in names if name not in known]
    if unknown:
        close = get_close_matches(str(unknown[0]), known, 1)
        hint = f"did you mean {close[0]}?" if close else "--help lists the settings"
        raise ValueError(f"{where} has unknown settings: {', '.join(map(str, unknown))}; {hint}")


def load_pipeline(model: ModelArguments, token: str | None) -> Any:
    """Returns the pipeline to train, as it was published."""
    given = {"revision": model.revision, "variant": model.variant, "token": token}
    if model.dtype is not None:
        given["dtype"] = getattr(torch, model.dtype)
    return DiffusionPipeline.from_pretrained(
        model.pretrained_model_name_or_path, **{name: value for name, value in given.items() if value is not None}
    )


def put_adapter(pipeline: Any, model: ModelArguments, args: ContrastiveFlowMatchingArguments) -> None:
    """Gives the pipeline the adapter to train: a fresh one, or the one that is to be trained on."""
    shape = {"num_tokens": model.num_tokens, "num_layers": model.num_layers, "stages": model.stages}
    shape = {name: value for name, value in shape.items() if value is not None}
    if model.num_timestep_bins is not None:
        shape["num_timestep_bins"] = model.num_timestep_bins or None
    if model.init == "text":
        shape["init"] = "text"
    if model.adapter is not None:
        if shape:
            raise ValueError(f"adapter={model.adapter} brings its own shape; leave out {', '.join(shape)}")
        load_softrepa(pipeline, model.adapter, is_trainable=True, token=args.hub_token)
        return
    conditioner = conditioner_of(pipeline, max_sequence_length=args.max_sequence_length)
    banks = args.make_objective(conditioner.noising.prediction).num_banks
    config = SoftREPAConfig.for_denoiser(denoiser_of(pipeline), num_banks=banks, **shape)
    embeddings = text_stream(conditioner, model.init_text) if model.init == "text" else None
    generator = torch.Generator().manual_seed(args.seed)
    add_softrepa(pipeline, config, text_embeddings=embeddings, generator=generator)


@torch.no_grad()
def text_stream(conditioner: Any, text: str) -> Tensor:
    """Returns what the first block that reads text reads of this text, (S, D)."""
    denoiser, read = conditioner.denoiser, []
    block = text_blocks(denoiser, family_of(denoiser))[0]
    hook = block.module.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs[block.group.text]), with_kwargs=True
    )
    try:
        side = conditioner.image_multiple * 4
        latents = torch.zeros(1, *conditioner.latent_shape(side, side), device=denoiser.device)
        conditioner.predict(latents, torch.zeros(1), conditioner.encode_captions([text]))
    finally:
        hook.remove()
    return read[0][0].float()


def rows_of(source: str | None, split: str, streaming: bool) -> Any:
    """Returns a source for the trainer: as it is where its split is the usual one, else its rows."""
    if source is None or (split == "train" and not streaming):
        return source
    return load_rows(source, split, streaming or None)


def train(argv: Sequence[str]) -> None:
    """Trains, and says where the result is."""
    model, data, args = parse(argv)
    train_data = rows_of(data.train_data, data.train_split, data.streaming)
    eval_data = rows_of(data.eval_data, data.eval_split, data.streaming)
    train_data, eval_data = check_run(args, train_data, eval_data)  # before a model is loaded
    pipeline = load_pipeline(model, args.hub_token)
    put_adapter(pipeline, model, args)
    trainer = ContrastiveFlowMatchingTrainer(pipeline, args, train_data, eval_data)
    result = trainer.train()
    if args.dry_run:
        return
    if not result.finished:
        checkpoint = Checkpoints(args.output_dir).latest()
        trainer.accelerator.print(
            f"\nStopped after step {result.step}; everything is in {checkpoint}. Go on from there with\n"
            f"    --resume_from_checkpoint latest"
        )
        return
    best = ""
    if trainer.state.best_global_step:
        best = f" The best one by held-out {args.metric_for_best_model} is in {args.output_dir}/best."
    trainer.accelerator.print(
        f"\nThe adapter is in {args.output_dir}; README.md there shows how it learned.{best} Use it with\n"
        f"    import diffusers_softrepa\n"
        f"    pipe.load_softrepa({args.output_dir!r})"
    )


def main(argv: Sequence[str]) -> int:
    """Trains and returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path or a prompt that the terminal has no letters for
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        train([word for word in argv if word != "--debug"])
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
