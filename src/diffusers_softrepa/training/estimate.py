"""Estimates: what a training run will do and how much memory and disk it takes, before anything is written.

Activations are measured: one pair runs forward through the denoiser as in training, and the storages that autograd
keeps for the backward pass are counted, each once, parameters and buffers left out. Pairs are independent, so a chunk
of them keeps that much for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

from ..conditioning import Conditioner
from ..conditioning.conditions import Conditions
from ..objectives import Objective
from ..pairs import pair_errors
from ..quoting import human_bytes
from .arguments import ContrastiveFlowMatchingArguments
from .data.cache import estimate
from .data.dataset import Examples
from .data.image import Size
from .optimization import make_optimizer
from .step.engine import AUTOMATIC_CHUNK


@dataclass(frozen=True)
class Estimate:
    """The size of a run; bytes are those of one process.

    Attributes:
        steps: Optimizer steps.
        epochs: Passes over the data, None of a stream.
        images: Training images, None of a stream.
        images_per_step: Of all processes and accumulated batches.
        captions_per_image: That each image is compared with, its own included; written negatives come on top.
        pairs_per_step: Image-caption pairs of a step.
        pairs_at_once: Pairs whose activations are alive together, in one process.
        trainable_parameters: Numbers in the soft tokens.
        frozen_parameters: Numbers in the rest of the pipeline.
        weights_bytes: Of the whole pipeline with the tokens, and buffers.
        optimizer_bytes: Of the optimizer's state, gradients and the moving average.
        activation_bytes_per_pair: Measured, at the largest image size.
        prediction_bytes: Predictions and targets that the objective keeps of all pairs.
        latent_cache_bytes: On the disk; None without that cache or for a stream.
        text_cache_bytes: Likewise.
    """

    steps: int
    epochs: float | None
    images: int | None
    images_per_step: int
    captions_per_image: int
    pairs_per_step: int
    pairs_at_once: int
    trainable_parameters: int
    frozen_parameters: int
    weights_bytes: int
    optimizer_bytes: int
    activation_bytes_per_pair: int
    prediction_bytes: int
    latent_cache_bytes: int | None
    text_cache_bytes: int | None

    @property
    def activation_bytes(self) -> int:
        """Of one chunk of pairs."""
        return self.activation_bytes_per_pair * self.pairs_at_once

    @property
    def total_bytes(self) -> int:
        """Memory of one process, as far as it is known."""
        return self.weights_bytes + self.optimizer_bytes + self.activation_bytes + self.prediction_bytes

    def __str__(self) -> str:
        epochs = "an open number of epochs" if self.epochs is None else f"{self.epochs:.3g} epochs"
        images = "a stream" if self.images is None else f"{self.images:,} images"
        per_pair = human_bytes(self.activation_bytes_per_pair)
        rows = {
            "steps": f"{self.steps:,}, {epochs} of {images}",
            "a step": f"{self.images_per_step} images, each with {self.captions_per_image} captions: "
            f"{self.pairs_per_step} pairs, {self.pairs_at_once} at once",
            "soft tokens": f"{self.trainable_parameters:,} numbers in training",
            "frozen": f"{self.frozen_parameters:,} numbers",
            "memory": f"about {human_bytes(self.total_bytes)} in each process:",
            "  weights": human_bytes(self.weights_bytes),
            "  optimizer": f"{human_bytes(self.optimizer_bytes)} (state, gradients, moving average)",
            "  activations": f"{human_bytes(self.activation_bytes)} ({self.pairs_at_once} pairs of {per_pair})",
            "  predictions": human_bytes(self.prediction_bytes) if self.prediction_bytes else None,
            "latent cache": self._cache(self.latent_cache_bytes),
            "text cache": self._cache(self.text_cache_bytes),
        }
        lines = [f"{name:<14}{text}" for name, text in rows.items() if text is not None]
        return "\n".join([*lines, "", _NOTE])

    @staticmethod
    def _cache(size: int | None) -> str | None:
        return None if size is None else f"{human_bytes(size)} on the disk, less what is there already"


_NOTE = """The memory is an estimate: activations are what autograd keeps of one pair, measured, times the pairs at
once. Left out are what a block needs while it runs (with gradient checkpointing also the activations of the block
that is run again), encoding images and captions, validation pictures, and what the allocator holds back. If memory
runs out in training, the number of pairs at once is halved."""


def estimate_run(
    args: ContrastiveFlowMatchingArguments,
    conditioner: Conditioner,
    objective: Objective,
    parameters: Sequence[Parameter],
    examples: Examples,
    *,
    sizes: Sequence[Size],
    steps: int,
    batches_per_epoch: int | None,
    num_processes: int = 1,
    device: torch.device | None = None,
) -> Estimate:
    """Measures one pair and counts the rest; nothing is written, no token is changed.

    Args:
        args: The settings.
        conditioner: Of the pipeline, which is where and how it will be trained.
        objective: In training.
        parameters: The soft tokens.
        examples: The training data.
        sizes: (H, W) that images are brought to, in pixels; the largest is measured.
        steps: Optimizer steps.
        batches_per_epoch: Of one process; None of a stream.
        num_processes: That train together.
        device: Where the denoiser runs; the CPU unless given.
    """
    batch_size = args.train_batch_size
    captions = batch_size * num_processes
    latent = conditioner.latent_shape(*max(sizes, key=lambda size: size[0] * size[1]))
    conditions = conditioner.encode_captions(["a picture"])
    kept = 0
    if objective.needs_ema_predictions:  # predictions and shifted targets, float32
        kept = 2 * batch_size * captions * torch.Size(latent).numel() * 4
    frozen = _frozen(conditioner.pipeline)
    return Estimate(
        steps=steps,
        epochs=None if batches_per_epoch is None else steps * args.gradient_accumulation_steps / batches_per_epoch,
        images=examples.count,
        images_per_step=captions * args.gradient_accumulation_steps,
        captions_per_image=captions,
        pairs_per_step=args.gradient_accumulation_steps * captions * (captions if objective.min_negatives else 1),
        pairs_at_once=_pairs_at_once(args, objective, captions),
        trainable_parameters=sum(parameter.numel() for parameter in parameters),
        frozen_parameters=sum(tensor.numel() for tensor in frozen if isinstance(tensor, Parameter)),
        weights_bytes=_num_bytes([*frozen, *parameters]),
        optimizer_bytes=_optimizer_bytes(args, parameters),
        activation_bytes_per_pair=activation_bytes(
            conditioner, conditions, latent, torch.device("cpu") if device is None else device
        ),
        prediction_bytes=kept,
        latent_cache_bytes=_latent_cache_bytes(args, examples, latent),
        text_cache_bytes=_text_cache_bytes(args, examples, conditions),
    )


def activation_bytes(
    conditioner: Conditioner, conditions: Conditions, latent: Sequence[int], device: torch.device
) -> int:
    """Runs one pair forward and returns the bytes that autograd keeps for its backward pass.

    Args:
        conditioner: Of the pipeline.
        conditions: Of one caption.
        latent: Shape (C, h, w) of the image's latents.
        device: Where the denoiser runs.
    """
    resident = {tensor.untyped_storage().data_ptr() for tensor in _tensors_of(conditioner.denoiser)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    noisy = torch.zeros(1, *latent, device=device)
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        # The graph lives until the count is done, so that no address is given out twice.
        error = pair_errors(conditioner.predict(noisy, torch.tensor([500.0], device=device), conditions), noisy)
    del error
    return sum(kept.values())


def _pairs_at_once(args: ContrastiveFlowMatchingArguments, objective: Objective, captions: int) -> int:
    """Returns how many pairs the engine trains together: whole rows where a chunk holds one."""
    chunk = args.pair_chunk_size or AUTOMATIC_CHUNK
    row = captions if objective.min_negatives else 1
    if args.num_backward_negatives is not None:
        row = min(row, 1 + args.num_backward_negatives)
    return chunk if row > chunk else row * min(args.train_batch_size, chunk // row)


def _frozen(pipeline: Any) -> list[Tensor]:
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return [tensor for module in modules for tensor in _tensors_of(module)]


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _optimizer_bytes(args: ContrastiveFlowMatchingArguments, parameters: Sequence[Parameter]) -> int:
    """Returns the bytes of state, gradients and average, after a step of copies of the tokens."""
    copies = [Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer = make_optimizer(args, copies)
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    # The sum over chunks, that over batches, and the part of one chunk.
    copies_of_tokens = 3 + (args.ema_decay is not None)
    return _num_bytes(state) + copies_of_tokens * _num_bytes(copies)


def _latent_cache_bytes(
    args: ContrastiveFlowMatchingArguments, examples: Examples, latent: Sequence[int]
) -> int | None:
    if not args.cache_latents or examples.count is None:
        return None
    return estimate({"latents": torch.empty(*latent, device="meta")}, examples.count)


def _text_cache_bytes(
    args: ContrastiveFlowMatchingArguments, examples: Examples, conditions: Conditions
) -> int | None:
    if not args.cache_text or examples.count is None:
        return None
    return estimate({name: value[0] for name, value in conditions.items()}, sum(1 for _ in examples.captions()))
