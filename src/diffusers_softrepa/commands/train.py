"""`softrepa train`: trains soft tokens on your own images.

    softrepa train --pretrained_model_name_or_path MODEL --train_data photos/
    softrepa train settings.yaml --max_steps 100
    accelerate launch -m diffusers_softrepa train settings.yaml

The options are the fields of `ContrastiveFlowMatchingArguments` and those below. With `--dry_run` it prints steps,
parameters and memory, and trains nothing.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..conditioning import conditioner_of
from ..conditioning.text import text_stream
from ..config import SoftREPAConfig
from ..pipeline import add_softrepa, denoiser_of, load_softrepa
from ..training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer
from ..training.checkpoints import Checkpoints
from ..training.sources import load_rows
from .models import Precision, load_pipeline
from .settings import needed, option, parse


@dataclass
class ModelOptions:
    """What to train."""

    pretrained_model_name_or_path: str = needed("Text-to-image pipeline to train for: a Hub id or a folder.")
    revision: str | None = option("Branch, tag or commit of the pipeline on the Hub.")
    variant: str | None = option("Variant of the pipeline's files, such as fp16.")
    dtype: Precision | None = option(
        "Precision that the pipeline is loaded in; mixed_precision says in what denoiser and text encoders train."
    )
    adapter: str | None = option("Adapter to train on, a folder or Hub id, instead of a fresh one.")
    num_tokens: int | None = option("Soft tokens per layer of a fresh adapter; the published number unless given.")
    num_layers: int | None = option("How many of the first blocks that read text get tokens, in transformers.")
    stages: list[str] | None = field(
        default=None, metadata={"help": "Stages whose blocks see the tokens (down, mid, up), in UNets."}
    )
    num_timestep_bins: int | None = option("Timestep bins of a fresh adapter; 0 for tokens that ignore the timestep.")
    init: Literal["normal", "text"] = option(
        "Start of fresh tokens: noise alone, or the rows of a text plus noise.", "normal"
    )
    init_text: str = option(
        "Text that tokens start from with init=text.", "a high quality picture that shows exactly what was asked for"
    )


@dataclass
class DataOptions:
    """What to learn from."""

    train_data: str = needed("Folder with metadata.jsonl, webdataset shards, or a data set on the disk or the Hub.")
    train_split: str = option("Split of the training data, where a data set has several.", "train")
    eval_data: str | None = option("Held-out images with captions, in the forms of train_data.")
    eval_split: str = option("Split of the held-out data.", "train")
    streaming: bool = option("Read data sets of the Hub while they are downloaded, without a copy on the disk.", False)


def settings(argv: Sequence[str]) -> tuple[ModelOptions, DataOptions, ContrastiveFlowMatchingArguments]:
    """Returns the settings of a command line and of the file that it names.

    Raises:
        ValueError: A setting is unknown, missing or out of range, or the file is not YAML or JSON.
        OSError: There is no such file.
    """
    classes = (ModelOptions, DataOptions, ContrastiveFlowMatchingArguments)
    meaning = "Trains soft tokens on your own images; `accelerate launch -m diffusers_softrepa train` on several GPUs."
    model, data, args = parse("train", meaning, classes, argv, defaults=_launched_with())
    return model, data, args


def _launched_with() -> dict[str, Any]:
    """Returns what `accelerate launch` or its configuration file said, by the name of our setting."""
    variables = {
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION"),
        "gradient_accumulation_steps": os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    }
    ours = {entry.name for entry in dataclasses.fields(ContrastiveFlowMatchingArguments)}
    return {name: value for name, value in variables.items() if value is not None and name in ours}


def put_adapter(pipeline: Any, model: ModelOptions, args: ContrastiveFlowMatchingArguments) -> None:
    """Gives the pipeline the adapter to train: a fresh one, or the one that is to be trained on.

    Raises:
        ValueError: The shape of an adapter that is there was given, or a fresh one does not fit the denoiser.
    """
    shape: dict[str, Any] = {"num_tokens": model.num_tokens, "num_layers": model.num_layers, "stages": model.stages}
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


def _rows(source: str | None, split: str, streaming: bool) -> Any:
    """Returns a source for the trainer: as it is where its split is the usual one, else its rows."""
    if source is None or (split == "train" and not streaming):
        return source
    return load_rows(source, split, streaming or None)


def main(argv: Sequence[str]) -> None:
    """Trains, and says where the result is."""
    model, data, args = settings(argv)
    pipeline = load_pipeline(
        model.pretrained_model_name_or_path,
        revision=model.revision,
        variant=model.variant,
        dtype=model.dtype,
        token=args.hub_token,
    )
    put_adapter(pipeline, model, args)
    trainer = ContrastiveFlowMatchingTrainer(
        pipeline,
        args,
        _rows(data.train_data, data.train_split, data.streaming),
        _rows(data.eval_data, data.eval_split, data.streaming),
    )
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
    best = f" The best one by held-out top-1 is in {args.output_dir}/best." if data.eval_data else ""
    trainer.accelerator.print(
        f"\nThe adapter is in {args.output_dir}; README.md there shows how it learned.{best} Use it with\n"
        f"    import diffusers_softrepa\n"
        f"    pipe.load_softrepa({args.output_dir!r})"
    )
