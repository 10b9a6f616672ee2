"""From loaded examples to the pairs that the engine runs.

Every random number is drawn from (seed, number of the batch, row of the global batch), so it is the same for any
number of processes, and in a resumed run. Captions are gathered from all processes; written negatives stay with their
image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from ...conditioning.conditions import Conditions, concatenate
from ...noising import Noising, sample_timesteps
from ...pairs import candidate_mask
from ..arguments import ContrastiveFlowMatchingArguments
from ..data.dataset import Example, meanings
from ..data.encode import Encoder
from .engine import PairBatch

NOISE, TIMESTEP, LATENTS, NEGATIVES = range(4)  # what a random number is for


@final
@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch.

    Attributes:
        seed: Seed of the run.
        batch: Number of the batch in the run.
        first_row: Row of the global batch at which this process's rows begin; defaults to 0.
    """

    seed: int
    batch: int
    first_row: int = 0

    def generators(self, count: int, purpose: int, *, share: bool = False) -> list[Generator]:
        """Returns a CPU generator for each of `count` rows of this process, with numbers of its own for each purpose.

        With `share` there is one generator, the same for all processes.
        """
        rows = [0] if share else range(self.first_row, self.first_row + count)
        words = (np.random.SeedSequence((self.seed, self.batch, row, purpose)).generate_state(2) for row in rows)
        return [Generator().manual_seed(int(high) << 32 | int(low)) for high, low in words]


def draw_noise(draws: Draws, shape: Sequence[int], *, share: bool) -> Tensor:
    """Returns standard normal noise for latents of `shape` (b, ...), one for all rows if `share`, on the CPU."""
    generators = draws.generators(shape[0], NOISE, share=share)
    return randn_tensor(
        (len(generators), *shape[1:]), generators, dtype=torch.float32, device=torch.device("cpu")
    ).expand(*shape)


def draw_timesteps(draws: Draws, count: int, args: ContrastiveFlowMatchingArguments) -> Tensor:
    """Returns timesteps (count,) from the density of the settings, squeezed into [min_timestep, max_timestep)."""
    density: Any = {"mean": args.logit_mean, "std": args.logit_std, "shift": args.timestep_shift}
    generators = draws.generators(count, TIMESTEP, share=args.share_timestep)
    drawn = sample_timesteps(len(generators), density=args.timestep_density, generator=generators, **density)
    return args.min_timestep + drawn.expand(count) / 1000 * (args.max_timestep - args.min_timestep)


def spread_timesteps(number: int, first_row: int, count: int, total: int) -> Tensor:
    """Returns evenly spread timesteps (count,) for the rows from `first_row` of an evaluation batch of `total` rows.

    They are shifted from one batch to the next, so that a few batches cover the scale finely.
    """
    return (torch.arange(first_row, first_row + count) + (number % 7 + 0.5) / 7) * 1000 / total


def min_snr_weights(noising: Noising, timestep: Tensor, gamma: float) -> Tensor:
    """Returns the min-SNR weight of each timestep: min(snr, gamma) / snr for epsilon, / (snr + 1) for v.

    Args:
        noising: Noising of a model that predicts epsilon or v.
        timestep: Timesteps (b,) int64.
        gamma: Largest signal-to-noise ratio with full weight.

    Returns:
        (b,) float32.

    Source:
        Min-SNR, arXiv 2303.09556, section 3.4.
    """
    snr = compute_snr(noising, timestep)
    return snr.clamp(max=gamma) / (snr + 1) if noising.prediction == "v_prediction" else (gamma / snr).clamp(max=1)


@final
class PairCollator:
    """Turns loaded examples into a `PairBatch`.

    Args:
        args: The settings.
        encoder: Encoder of images and captions.
        noising: Noising of the pipeline.
        accelerator: The accelerator, which knows the processes.

    Raises:
        ValueError: `snr_gamma` is given for a flow matching model.
    """

    def __init__(
        self, args: ContrastiveFlowMatchingArguments, encoder: Encoder, noising: Noising, accelerator: Accelerator
    ) -> None:
        if args.snr_gamma is not None and noising.prediction == "flow":
            raise ValueError(
                "snr_gamma weighs the timesteps of models that predict noise or v, but this one predicts a velocity; "
                "leave it out, and choose a timestep_density instead"
            )
        self._args, self._encoder, self._noising, self._accelerator = args, encoder, noising, accelerator

    def __call__(self, examples: Sequence[Example], draws: Draws, timestep: Tensor | None = None) -> PairBatch:
        """Returns the pairs of a batch.

        Args:
            examples: Loaded examples of one size, b in every process.
            draws: The random numbers of the batch.
            timestep: Timesteps (b,) on the 0..1000 scale; defaults to None, drawn ones.
        """
        count, device = len(examples), self._accelerator.device
        latents = self._encoder.encode_images(examples, draws.generators(count, LATENTS))
        noise = draw_noise(draws, latents.shape, share=self._args.share_noise).to(device)
        timestep = draw_timesteps(draws, count, self._args) if timestep is None else timestep
        timestep = self._noising.round_timestep(timestep).to(device)
        conditions, positive, candidates = self._gather_captions(examples)
        gamma = self._args.snr_gamma
        return PairBatch(
            noisy_latents=self._noising.noisy_latents(latents, noise, timestep),
            target=self._noising.target(latents, noise, timestep),
            timestep=timestep,
            conditions=conditions,
            positive=positive.to(device),
            candidates=candidates.to(device),
            row_weights=None if gamma is None else min_snr_weights(self._noising, timestep, gamma),
        )

    def _gather_captions(self, examples: Sequence[Example]) -> tuple[Conditions, Tensor, Tensor]:
        """Returns the encoded captions (c rows), the column of each image's own (b,), and the candidates (b, c).

        The columns are the captions of all processes, then the negatives written for this process's images.
        """
        own = [example.caption for example in examples]
        written = [(text, example.image_id) for example in examples for text in example.negative_captions]
        encoded = self._encoder.encode_captions([*own, *(text for text, _ in written)])
        texts, ids, first = own, [example.image_id for example in examples], 0
        if self._accelerator.num_processes > 1:
            first = self._accelerator.process_index * len(own)
            texts, ids = gather_object(texts), gather_object(ids)
            mine = {name: value[: len(own)].contiguous() for name, value in encoded.items()}
            gathered = {name: self._accelerator.gather(value) for name, value in mine.items()}
            encoded = concatenate([gathered, {name: value[len(own) :] for name, value in encoded.items()}])
        is_written = [False] * len(texts) + [True] * len(written)
        texts, ids = [*texts, *(text for text, _ in written)], [*ids, *(identity for _, identity in written)]
        texts = meanings(texts)
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        positive = torch.arange(first, first + len(own))
        candidates = candidate_mask(
            positive, torch.tensor([numbers[text] for text in texts]), torch.tensor(ids), torch.tensor(is_written)
        )
        return encoded, positive, candidates
