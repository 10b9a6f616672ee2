"""`softrepa train`: trains soft tokens on your own images.

    softrepa train --pretrained_model_name_or_path MODEL --train_data photos/
    softrepa train settings.yaml --max_steps 100
    accelerate launch -m diffusers_softrepa train settings.yaml

The options are the fields of `ContrastiveFlowMatchingArguments` and those of the dataclasses below. With `--dry_run`
the command prints steps, parameters and memory, and does not train.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..conditioning import conditioner_of
from ..conditioning.text import text_stream
from ..config import SoftREPAConfig
from ..pipeline import add_softrepa, denoiser_of, load_softrepa
from ..training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer, check_run
from ..training.arguments import with_new_names
from ..training.checkpoints import Checkpoints
from ..training.data import open_examples
from .models import Precision, load_pipeline
from .settings import check_texts, needed, option, parse


@dataclass
class ModelOptions:
    """Options of the pipeline and the adapter."""

    pretrained_model_name_or_path: str = needed("Text-to-image pipeline to train for: a Hub id or a folder.")
    revision: str | None = option("Branch, tag or commit of the pipeline on the Hub.")
    variant: str | None = option("Variant of the pipeline's files, such as fp16.")
    dtype: Precision | None = option(
        "Precision that the pipeline is loaded in; denoiser and text encoders then run in that of mixed_precision."
    )
    adapter: str | None = option("Adapter to continue training, a folder or Hub id; a new one unless given.")
    num_tokens: int | None = option("Soft tokens per layer of a new adapter; the published number unless given.")
    num_layers: int | None = option(
        "Number of transformer blocks with tokens, from the first one; the published number unless given."
    )
    stages: list[str] | None = field(
        default=None, metadata={"help": "Stages of a UNet whose blocks get tokens: down, mid, up."}
    )
    num_timestep_bins: int | None = option(
        "Timestep bins of a new adapter; 0 for tokens that do not depend on the timestep."
    )
    init: Literal["normal", "text"] = option(
        "Initial tokens: noise, or the embedding of init_text plus noise.", "normal"
    )
    init_text: str = option(
        "Text whose embedding tokens start from with init=text.",
        "a high quality image that shows exactly what was asked for",
    )


@dataclass
class DataOptions:
    """Options of the training data."""

    train_data: str = needed(
        "Folder of images with captions, webdataset shards, or a data set on the disk or the Hub; or several of them "
        'with weights: {"photos": 1, "paintings": 2}.'
    )
    train_split: str = option("Split of train_data, for a data set that has several.", "train")
    eval_data: str | None = option("Images with captions for evaluation, in any form of train_data.")
    eval_split: str = option("Split of eval_data.", "train")
    streaming: bool = option("Read data sets of the Hub while they are downloaded, without storing them.", False)


MEANING = "Trains soft tokens on your own images; `accelerate launch -m diffusers_softrepa train` on several GPUs."
OPTIONS = (ModelOptions, DataOptions, ContrastiveFlowMatchingArguments)


def settings(argv: Sequence[str]) -> tuple[ModelOptions, DataOptions, ContrastiveFlowMatchingArguments]:
    """Returns the settings of a command line and of the settings file that it names.

    Raises:
        ValueError: A setting is unknown, missing or out of range, or the file is not YAML or JSON.
        OSError: There is no such file.
    """
    model, data, args = parse("train", MEANING, OPTIONS, argv, renamed=with_new_names)
    return model, data, args


def put_adapter(pipeline: Any, model: ModelOptions, args: ContrastiveFlowMatchingArguments) -> None:
    """Adds a new adapter to the pipeline, or loads the one whose training continues.

    Raises:
        ValueError: Options of a new adapter were given for an existing one, or a new one does not fit the denoiser.
    """
    shape: dict[str, Any] = {"num_tokens": model.num_tokens, "num_layers": model.num_layers, "stages": model.stages}
    shape = {name: value for name, value in shape.items() if value is not None}
    if model.num_timestep_bins is not None:
        shape["num_timestep_bins"] = model.num_timestep_bins or None
    if model.init == "text":
        shape["init"] = "text"
    if model.adapter is not None:
        if shape:
            raise ValueError(f"adapter={model.adapter} already has its shape; leave out {', '.join(shape)}")
        load_softrepa(pipeline, model.adapter, is_trainable=True, token=args.hub_token)
        return
    conditioner = conditioner_of(pipeline, max_sequence_length=args.max_sequence_length)
    banks = args.make_objective(conditioner.noising.prediction).num_banks
    config = SoftREPAConfig.for_denoiser(denoiser_of(pipeline), num_banks=banks, **shape)
    embeddings = text_stream(conditioner, model.init_text) if model.init == "text" else None
    generator = torch.Generator().manual_seed(args.seed)
    add_softrepa(pipeline, config, text_embeddings=embeddings, generator=generator)


def _opened(source: str | None, split: str, streaming: bool, args: ContrastiveFlowMatchingArguments) -> Any:
    """Returns a data source for the trainer, opened here if another split or streaming is asked for."""
    if source is None or (split == "train" and not streaming):
        return source
    return open_examples(
        source,
        image_column=args.image_column,
        caption_column=args.caption_column,
        negative_caption_column=args.negative_caption_column,
        split=split,
        streaming=streaming or None,
        exclude=args.output_dir,
    )


def main(argv: Sequence[str]) -> None:
    """Trains and prints where the adapter is."""
    model, data, args = settings(argv)
    check_texts(model, "init_text")
    if not data.train_data:
        raise ValueError("train_data must name images or a data set, but is empty")
    train_data, eval_data = check_run(  # before a model is loaded
        args,
        _opened(data.train_data, data.train_split, data.streaming, args),
        _opened(data.eval_data, data.eval_split, data.streaming, args),
    )
    pipeline = load_pipeline(
        model.pretrained_model_name_or_path,
        revision=model.revision,
        variant=model.variant,
        dtype=model.dtype,
        token=args.hub_token,
    )
    put_adapter(pipeline, model, args)
    trainer = ContrastiveFlowMatchingTrainer(pipeline, args, train_data, eval_data)
    result = trainer.train()
    if args.dry_run:
        return
    if not result.finished:
        checkpoint = Checkpoints(args.output_dir).latest()
        trainer.accelerator.print(
            f"\nStopped after step {result.step} and saved {checkpoint}. Continue from there with\n"
            f"    --resume_from_checkpoint latest"
        )
        return
    best = ""
    if trainer.state.best_global_step:
        best = f" The one with the best {args.metric_for_best_model} is in {args.output_dir}/best."
    trainer.accelerator.print(
        f"\nThe adapter is in {args.output_dir}; README.md describes the training.{best} Use it with\n"
        f"    import diffusers_softrepa\n"
        f"    pipe.load_softrepa({args.output_dir!r})"
    )
