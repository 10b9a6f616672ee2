"""From a loaded batch to latents and encoded captions, out of a cache where there is one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..conditioning import Conditioner
from ..conditioning.conditions import Conditions, concatenate
from .arguments import ContrastiveFlowMatchingArguments
from .batches import Draws
from .cache import TensorCache, fill, model_fingerprint
from .data import Examples
from .images import Framing
from .loader import Batch
from .rows import fill_latents

ENCODE_BATCH_SIZE = 16


class Inputs:
    """Encodes images and captions for a denoiser.

    Args:
        conditioner: Of the pipeline.
        device: Where latents and conditions go.
        text_cache: Encoded captions, one entry each; None to encode them every time.
    """

    def __init__(self, conditioner: Conditioner, device: torch.device, text_cache: TensorCache | None = None) -> None:
        self._conditioner = conditioner
        self._device = device
        self._text_cache = text_cache

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Returns the latents of a batch, (b, C, h, w) float32: a sample of the VAE's posterior, or the cached one."""
        if batch.latents is not None:
            return batch.latents["latents"].to(self._device, torch.float32)
        if batch.pixels is None:
            raise ValueError("a batch needs pixels or cached latents, but has neither")
        generators: Any = [draws.generator(row, purpose=2) for row in range(len(batch))]
        return self._conditioner.encode_images(batch.pixels, generators).to(self._device)

    def conditions(self, captions: Sequence[str]) -> Conditions:
        """Returns the encoded captions, one row each."""
        distinct = list(dict.fromkeys(captions))
        encoded = self._cached(distinct) if self._text_cache is not None else self._encoded(distinct)
        row = {caption: number for number, caption in enumerate(distinct)}
        rows = torch.tensor([row[caption] for caption in captions])
        return {name: value.to(self._device)[rows.to(self._device)] for name, value in encoded.items()}

    def _encoded(self, captions: list[str]) -> Conditions:
        parts = [captions[first : first + ENCODE_BATCH_SIZE] for first in range(0, len(captions), ENCODE_BATCH_SIZE)]
        return concatenate([self._conditioner.encode_captions(part) for part in parts])

    def _cached(self, captions: list[str]) -> Conditions:
        assert self._text_cache is not None
        _fill_text(self._text_cache, captions, self._conditioner)
        entries = [entry for caption in captions if (entry := self._text_cache.get(caption)) is not None]
        if len(entries) < len(captions):  # somebody is deleting the cache
            return self._encoded(captions)
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}


@dataclass(frozen=True)
class Caches:
    """What a run keeps on disk instead of encoding it again.

    Attributes:
        latents: Of the training images: the mode of the VAE's posterior, at one crop; None to encode every time.
        text: Encoded captions and hard negatives; None to encode every time.
    """

    latents: TensorCache | None
    text: TensorCache | None

    @classmethod
    def open(cls, args: ContrastiveFlowMatchingArguments, conditioner: Conditioner, framing: Framing) -> "Caches":
        """Returns the caches that the settings ask for, with what earlier runs left in them; none in a dry run."""
        if args.dry_run:  # to open one makes its folder
            return cls(None, None)
        directory = args.cache_dir or Path(args.output_dir) / "cache"
        limit = int(args.max_cache_gigabytes * 1e9)

        def cache(kind: str, names: Iterable[str], **settings: Any) -> TensorCache:
            models = {name: model_fingerprint(part) for name in names if (part := components.get(name)) is not None}
            return TensorCache(directory, {"kind": kind, **models, **settings}, max_cache_bytes=limit)

        components = conditioner.pipeline.components
        encoders = [name for name in components if name.startswith("text_encoder")]
        text = {
            "conditioner": type(conditioner).__name__,
            "precision": args.mixed_precision,
            "max_sequence_length": args.max_sequence_length,
        }
        return cls(
            latents=cache("latents", ["vae"], **framing.settings(args.seed)) if args.cache_latents else None,
            text=cache("text", encoders, **text) if args.cache_text else None,
        )

    def fill(
        self,
        args: ContrastiveFlowMatchingArguments,
        conditioner: Conditioner,
        examples: Examples,
        framing: Framing,
        accelerator: Accelerator,
    ) -> None:
        """Computes what the caches lack, each process its share; says first how much disk that takes, or refuses.

        Raises:
            CacheTooLarge: More than `max_cache_gigabytes`, or than the disk has free.
            ValueError: The examples are a stream, or too many images are broken.
        """
        share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        if self.latents is not None:
            fill_latents(
                self.latents,
                examples,
                framing,
                lambda pixels: {"latents": conditioner.encode_images(pixels)},
                batch_size=ENCODE_BATCH_SIZE,
                seed=args.seed,
                max_broken=args.max_broken,
                **share,
            )
        if self.text is not None:
            _fill_text(self.text, list(examples.captions()), conditioner, **share)
        accelerator.wait_for_everyone()


def _fill_text(
    cache: TensorCache, captions: Sequence[str], conditioner: Conditioner, *, rank: int = 0, world_size: int = 1
) -> int:
    """Encodes the captions that a cache lacks; returns how many. Arguments and errors as `cache.fill`."""

    def encode(names: list[str]) -> list[Conditions]:
        encoded = conditioner.encode_captions(names)
        return [{name: value[row] for name, value in encoded.items()} for row in range(len(names))]

    return fill(cache, captions, encode, batch_size=ENCODE_BATCH_SIZE, rank=rank, world_size=world_size)
