"""The dry run: how many steps, parameters, bytes of memory and bytes of cache a training run will take.

Activations are measured: one pair runs forward through the denoiser as in training, and the storages that autograd
keeps for the backward pass are counted, without parameters and buffers. A chunk of n pairs keeps n times as much.
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
from .optimization import make_optimizer
from .step.engine import AUTOMATIC_CHUNK


@dataclass(frozen=True)
class Estimate:
    """The size of a training run; bytes are those of one process.

    Attributes:
        steps: Optimizer steps.
        epochs: Passes over the data; None for a stream.
        images: Training images; None for a stream.
        images_per_step: Images of a step, of all processes and accumulated batches.
        captions_per_image: Captions that each image is compared with, its own included, without written negatives.
        pairs_per_step: Image-caption pairs of a step.
        pairs_at_once: Pairs whose activations are in memory together.
        trainable_parameters: Numbers in the soft tokens.
        frozen_parameters: Numbers in the models of the pipeline.
        weights_bytes: Bytes of all weights and buffers.
        optimizer_bytes: Bytes of the optimizer's state, the gradients and the moving average.
        activation_bytes_per_pair: Bytes of activations of one pair at the largest image size.
        prediction_bytes: Bytes of predictions and targets that the objective keeps of all pairs.
        latent_cache_bytes: Bytes on the disk; None without that cache or for a stream.
        text_cache_bytes: Bytes on the disk; None without that cache or for a stream.
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
        """Bytes of activations of one chunk of pairs."""
        return self.activation_bytes_per_pair * self.pairs_at_once

    @property
    def total_bytes(self) -> int:
        """Bytes of memory of one process, as far as they are known."""
        return self.weights_bytes + self.optimizer_bytes + self.activation_bytes + self.prediction_bytes

    def __str__(self) -> str:
        epochs = "an open number of epochs" if self.epochs is None else f"{self.epochs:.3g} epochs"
        images = "a stream" if self.images is None else f"{self.images:,} images"
        per_pair = human_bytes(self.activation_bytes_per_pair)
        rows = {
            "steps": f"{self.steps:,}, {epochs} of {images}",
            "a step": f"{self.images_per_step} images, each with {self.captions_per_image} captions: "
            f"{self.pairs_per_step} pairs, {self.pairs_at_once} at once",
            "soft tokens": f"{self.trainable_parameters:,} trainable numbers",
            "frozen": f"{self.frozen_parameters:,} numbers",
            "memory": f"about {human_bytes(self.total_bytes)} in each process:",
            "  weights": human_bytes(self.weights_bytes),
            "  optimizer": f"{human_bytes(self.optimizer_bytes)} (state, gradients, moving average)",
            "  activations": f"{human_bytes(self.activation_bytes)} ({self.pairs_at_once} pairs of {per_pair})",
            "  predictions": human_bytes(self.prediction_bytes) if self.prediction_bytes else None,
            "latent cache": _on_disk(self.latent_cache_bytes),
            "text cache": _on_disk(self.text_cache_bytes),
        }
        lines = [f"{name:<14}{text}" for name, text in rows.items() if text is not None]
        return "\n".join([*lines, "", _NOTE])


_NOTE = """The memory is an estimate: the activations that autograd keeps of one pair are measured and multiplied by
the pairs at once. It leaves out what a block needs while it runs (with gradient checkpointing also the activations of
the block that runs again), encoding images and captions, validation images, and what the allocator holds back. If
memory runs out in training, the number of pairs at once is halved."""


def estimate_run(trainer: Any) -> Estimate:
    """Estimates the run of a trainer whose pipeline is prepared; writes nothing and changes no token."""
    args, conditioner, objective, examples = (
        trainer.args,
        trainer.conditioner,
        trainer.objective,
        trainer.train_examples,
    )
    captions = args.train_batch_size * trainer.accelerator.num_processes
    latent = conditioner.latent_shape(*max(trainer.framing.sizes, key=lambda size: size[0] * size[1]))
    conditions = conditioner.encode_captions(["an image"])
    models = [part for part in conditioner.pipeline.components.values() if isinstance(part, nn.Module)]
    frozen = [tensor for model in models for tensor in _tensors_of(model)]
    batches, count = trainer.batches_per_epoch, examples.count
    known = count is not None
    # With an EMA of the predictions, predictions and shifted targets of all pairs are kept, in float32.
    kept = 2 * args.train_batch_size * captions * torch.Size(latent).numel() * 4
    entry = {name: value[0] for name, value in conditions.items()}
    return Estimate(
        steps=trainer.state.max_steps,
        epochs=None if batches is None else trainer.state.max_steps * args.gradient_accumulation_steps / batches,
        images=count,
        images_per_step=captions * args.gradient_accumulation_steps,
        captions_per_image=captions,
        pairs_per_step=args.gradient_accumulation_steps * captions * (captions if objective.min_negatives else 1),
        pairs_at_once=_pairs_at_once(args, objective, captions),
        trainable_parameters=sum(parameter.numel() for parameter in trainer.parameters),
        frozen_parameters=sum(tensor.numel() for tensor in frozen if isinstance(tensor, Parameter)),
        weights_bytes=_num_bytes([*frozen, *trainer.parameters]),
        optimizer_bytes=_optimizer_bytes(args, trainer.parameters),
        activation_bytes_per_pair=activation_bytes(conditioner, conditions, latent, trainer.accelerator.device),
        prediction_bytes=kept if objective.needs_ema_predictions else 0,
        latent_cache_bytes=estimate({"latents": torch.empty(*latent, device="meta")}, count)
        if known and args.cache_latents
        else None,
        text_cache_bytes=estimate(entry, sum(1 for _ in examples.captions())) if known and args.cache_text else None,
    )


def activation_bytes(
    conditioner: Conditioner, conditions: Conditions, latent: Sequence[int], device: torch.device
) -> int:
    """Runs one pair forward and returns the bytes that autograd keeps for its backward pass.

    Args:
        conditioner: The conditioner of the pipeline.
        conditions: One encoded caption.
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
        # The graph lives until the count is done, so that no address is used twice.
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


def _optimizer_bytes(args: ContrastiveFlowMatchingArguments, parameters: Sequence[Parameter]) -> int:
    """Returns the bytes of state, gradients and average, after one step with copies of the tokens."""
    copies = [Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer = make_optimizer(args, copies)
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    # Gradients are there three times: summed over batches, summed over chunks, and of the present chunk.
    return _num_bytes(state) + (3 + (args.ema_decay is not None)) * _num_bytes(copies)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _on_disk(size: int | None) -> str | None:
    return None if size is None else f"{human_bytes(size)} on the disk, less what is there already"
