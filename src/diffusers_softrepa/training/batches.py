"""From a batch of images and captions to the pairs that the engine runs.

Every random number belongs to an image of the global batch: it is drawn from (seed, number of the batch, row), so it
is the same whatever the number of processes, and the same again in a resumed run.

Captions are gathered from all processes; written hard negatives stay with the image they were written for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..conditioning.conditions import Conditions, concatenate
from ..noising import Noising, sample_timesteps
from ..pairs import candidate_mask
from .arguments import ContrastiveFlowMatchingArguments
from .engine import PairBatch


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch.

    Attributes:
        seed: Of the run.
        batch: Number of the batch in the run.
        first_row: Where this process's rows begin in the global batch.
    """

    seed: int
    batch: int
    first_row: int = 0

    def generator(self, row: int, purpose: int = 0) -> torch.Generator:
        """Returns the CPU generator of a row of this process; each purpose has its own numbers."""
        words = np.random.SeedSequence((self.seed, self.batch, self.first_row + row, purpose)).generate_state(2)
        return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))

    @property
    def shared(self) -> "Draws":
        """The same draws for every process, for what one batch has in common."""
        return Draws(self.seed, self.batch)


def draw_noise(draws: Draws, shape: Sequence[int], *, share: bool) -> Tensor:
    """Returns standard normal noise for latents of `shape` (b, ...), one for all rows if `share`, on the CPU."""
    if share:
        return _normal(1, *shape[1:], generator=draws.shared.generator(0)).expand(*shape)
    return torch.stack([_normal(*shape[1:], generator=draws.generator(row)) for row in range(shape[0])])


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")  # whatever the defaults are


def draw_timesteps(draws: Draws, count: int, args: ContrastiveFlowMatchingArguments) -> Tensor:
    """Returns timesteps (count,) from the density of the settings, squeezed into [min_timestep, max_timestep)."""

    def one(generator: torch.Generator) -> Tensor:
        return sample_timesteps(
            1,
            density=args.timestep_density,
            mean=args.timestep_mean,
            std=args.timestep_std,
            shift=args.timestep_shift,
            generator=generator,
        )

    if args.share_timestep:
        drawn = one(draws.shared.generator(0, purpose=1)).expand(count)
    else:
        drawn = torch.cat([one(draws.generator(row, purpose=1)) for row in range(count)])
    return args.min_timestep + drawn / 1000 * (args.max_timestep - args.min_timestep)


@dataclass(frozen=True, eq=False)
class Captions:
    """The captions that the rows of one process meet.

    Attributes:
        conditions: Encoded, c rows: those of all processes, then this process's written negatives.
        positive: Column of each row's own caption, (b,) int64.
        candidates: Which of them take part for each row, (b, c) bool.
    """

    conditions: Conditions
    positive: Tensor
    candidates: Tensor


def meet_captions(
    accelerator: Accelerator,
    captions: Sequence[str],
    negatives: Sequence[Sequence[str]],
    image_ids: Tensor,
    conditions: Conditions,
) -> Captions:
    """Gathers the captions of all processes and says which are negatives of which image.

    Args:
        accelerator: The processes; each brings as many images.
        captions: One for each image of this process, b.
        negatives: The captions written to be wrong for each image, any number.
        image_ids: Identity of each image, (b,).
        conditions: The captions, then all written negatives, encoded; on the accelerator's device.
    """
    batch_size, device = len(captions), accelerator.device
    own = {name: value[:batch_size] for name, value in conditions.items()}
    written = {name: value[batch_size:] for name, value in conditions.items()}
    texts, ids, everyone = list(captions), image_ids.tolist(), own
    if accelerator.num_processes > 1:
        texts, ids = gather_object(texts), gather_object(ids)
        everyone = {name: accelerator.gather(value.contiguous()) for name, value in own.items()}
    first = accelerator.process_index * batch_size
    positive = torch.arange(first, first + batch_size)
    is_written = [False] * len(texts)
    for own_id, row_negatives in zip(image_ids.tolist(), negatives, strict=True):
        texts += row_negatives
        ids += [own_id] * len(row_negatives)
        is_written += [True] * len(row_negatives)
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    candidates = candidate_mask(
        positive,
        torch.tensor([numbers[text] for text in texts]),
        torch.tensor(ids),
        torch.tensor(is_written),
    )
    return Captions(concatenate([everyone, written]), positive.to(device), candidates.to(device))


def spread_timesteps(number: int, first_row: int, count: int, total: int) -> Tensor:
    """Returns timesteps (count,) for rows first_row... of an evaluation batch of `total`: evenly spread, not random.

    They are shifted a little from one batch to the next, so that a few batches cover the scale finely.
    """
    return (torch.arange(first_row, first_row + count) + (number % 7 + 0.5) / 7) * 1000 / total


def pair_batch(latents: Tensor, noise: Tensor, timestep: Tensor, noising: Noising, captions: Captions) -> PairBatch:
    """Noises latents (b, ...) and pairs them with captions."""
    timestep = noising.round_timestep(timestep).to(latents.device)
    noise = noise.to(latents.device)
    return PairBatch(
        noisy_latents=noising.noisy_latents(latents, noise, timestep),
        target=noising.target(latents, noise, timestep),
        timestep=timestep,
        conditions=captions.conditions,
        positive=captions.positive,
        candidates=captions.candidates,
    )
