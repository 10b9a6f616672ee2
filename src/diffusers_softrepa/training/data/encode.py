"""Latents and encoded captions of loaded examples, from a cache where the settings ask for one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, final

import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from ...conditioning import Conditioner
from ...conditioning.conditions import Conditions, concatenate
from ...files import read_json
from ...quoting import quoted
from ..arguments import ContrastiveFlowMatchingArguments
from ..preparation import text_encoders_on
from .cache import TensorCache, fill, model_fingerprint
from .dataset import Example, Examples
from .image import Framing, Size, content_id, fetch, image_size
from .loader import Reader
from .sampler import BrokenCount

logger = logging.getLogger(__name__)

ENCODE_BATCH_SIZE = 16


@final
class Encoder:
    """Encodes images and captions for a denoiser, and keeps the results on the disk where the settings ask for it.

    Attributes:
        latents: Cache of the latents of the training images, the mode of the VAE's posterior at one crop, or None.
        text: Cache of the encoded captions and written negatives, or None.

    Args:
        args: The settings. A dry run opens no cache, because that creates a folder.
        conditioner: The conditioner of the pipeline.
        framing: Sizes and crops of the images.
        device: Device of the returned tensors.
    """

    def __init__(
        self, args: ContrastiveFlowMatchingArguments, conditioner: Conditioner, framing: Framing, device: torch.device
    ) -> None:
        self._args, self._conditioner, self._framing, self._device = args, conditioner, framing, device
        self._components = components = conditioner.pipeline.components
        self._absent = [name for name in conditioner.text_components if components.get(name) is None]
        self._directory = Path(args.cache_dir or Path(args.output_dir) / "cache")
        text = {
            "kind": "text",
            "conditioner": type(conditioner).__name__,
            "precision": args.mixed_precision,
            "max_sequence_length": args.max_sequence_length,
        }
        self.latents: TensorCache | None = None
        self.text: TensorCache | None = None
        if args.dry_run:
            return
        if args.cache_latents:
            self.latents = self._open(["vae"], {"kind": "latents", **framing.settings(args.seed)})
        if self._absent:
            self.text = self._open([], self._filled_before(text))
        elif args.cache_text:
            self.text = self._open([name for name in components if name.startswith("text_encoder")], text)

    def encode_images(self, examples: Sequence[Example], generators: Sequence[Generator]) -> Tensor:
        """Returns latents (b, C, h, w) float32: samples of the VAE's posterior, or the cached latents.

        Args:
            examples: Loaded examples of one size.
            generators: A CPU generator for each.
        """
        cached = [example.latents["latents"] for example in examples if example.latents is not None]
        if cached:
            return torch.stack(cached).to(self._device, torch.float32)
        pixels = torch.stack([example.pixels for example in examples if example.pixels is not None])
        drawn: Any = list(generators)
        return self._conditioner.encode_images(pixels, drawn).to(self._device)

    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """Returns the encoded captions, one row for each."""
        distinct = list(dict.fromkeys(captions))
        encoded = self._from_cache(distinct) if self.text is not None else self._encoded(distinct)
        row = {caption: number for number, caption in enumerate(distinct)}
        rows = torch.tensor([row[caption] for caption in captions], device=self._device)
        return {name: value.to(self._device)[rows] for name, value in encoded.items()}

    def fill(
        self,
        examples: Examples,
        accelerator: Accelerator,
        *,
        eval_examples: Examples | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Computes what the caches lack, a share in each process.

        Args:
            examples: The training data.
            accelerator: The accelerator, which knows the processes.
            eval_examples: The evaluation data, whose captions are cached too; defaults to None.
            stop: Function that is called before each batch; filling stops where it returns True.

        Raises:
            CacheTooLarge: The entries need more than `max_cache_gigabytes`, or than the disk has free.
            ValueError: The examples are a stream, too many images are broken, or the pipeline has no text encoders and
                the cache lacks captions.
        """
        share: Any = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "stop": stop}
        if self.latents is not None:
            fill_latents(
                self.latents,
                examples,
                self._framing,
                lambda pixels: {"latents": self._conditioner.encode_images(pixels)},
                batch_size=ENCODE_BATCH_SIZE,
                seed=self._args.seed,
                max_broken=self._args.max_broken,
                **share,
            )
        if self.text is not None:
            captions = [text for data in (examples, eval_examples) if data is not None for text in data.captions()]
            self._fill_text(captions + [""] * (self._args.proportion_empty_prompts > 0), **share)
        accelerator.wait_for_everyone()

    def _open(self, names: Iterable[str], settings: Mapping[str, Any]) -> TensorCache:
        """Opens the cache of these settings and of the named models."""
        models = {name: model_fingerprint(part) for name in names if (part := self._components.get(name)) is not None}
        limit = int(self._args.max_cache_gigabytes * 1e9)
        return TensorCache(self._directory, {**models, **settings}, max_cache_bytes=limit)

    def _filled_before(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the settings of the cache that a run with text encoders filled under these settings.

        Raises:
            ValueError: There is none, or several.
        """
        needs = f"the pipeline has no {', '.join(self._absent)}"
        if not self._args.cache_text:
            raise ValueError(f"{needs}; load it with its text encoders, or set cache_text and the cache_dir of a run")
        if self._args.validation_prompts:
            raise ValueError(f"{needs}, so it cannot draw images; leave out validation_prompts")
        found = []
        for path in sorted(self._directory.glob("*/settings.json")):
            kept = read_json(path)
            if {name: value for name, value in kept.items() if not name.startswith("text_encoder")} == settings:
                found.append(kept)
        if len(found) != 1:
            raise ValueError(
                f"{needs}, so {self._directory} must hold one cache of captions that was filled for such a pipeline "
                f"with the same mixed_precision and max_sequence_length, but has {len(found)}; fill one by a run "
                "with text encoders and cache_text, in a cache_dir of its own"
            )
        return found[0]

    def _encoded(self, captions: Sequence[str]) -> Conditions:
        parts = [captions[first : first + ENCODE_BATCH_SIZE] for first in range(0, len(captions), ENCODE_BATCH_SIZE)]
        away = self._args.cache_text  # then the text encoders are not on the device
        with text_encoders_on(self._conditioner.pipeline, self._device) if away else nullcontext():
            encoded = [self._conditioner.encode_captions(part) for part in parts]
        return encoded[0] if len(encoded) == 1 else concatenate(encoded)

    def _from_cache(self, captions: list[str]) -> Conditions:
        assert self.text is not None
        self._fill_text(captions)
        entries = [entry for caption in captions if (entry := self.text.get(caption)) is not None]
        if len(entries) < len(captions):  # the cache was deleted meanwhile
            return self._encoded(captions)
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    def _fill_text(self, captions: Sequence[str], **share: Any) -> None:
        """Encodes the captions that the cache lacks; arguments and errors as in `cache.fill`."""
        assert self.text is not None
        missing = self.text.missing(captions)
        if not missing and not share:
            return
        if missing and self._absent:
            raise ValueError(
                f"the pipeline has no {', '.join(self._absent)}, and {self.text.folder} lacks {len(missing)} "
                f"captions, such as {quoted(missing[0])}; load the pipeline with its text encoders once to encode them"
            )

        def encode(names: list[str]) -> list[Conditions]:
            encoded = self._conditioner.encode_captions(names)
            return [{name: value[row] for name, value in encoded.items()} for row in range(len(names))]

        with text_encoders_on(self._conditioner.pipeline, self._device) if missing else nullcontext():
            fill(self.text, captions, encode, batch_size=ENCODE_BATCH_SIZE, **share)


def fill_latents(
    cache: TensorCache,
    examples: Examples,
    framing: Framing,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    *,
    batch_size: int,
    seed: int = 0,
    max_broken: int | float = 0.01,
    stop: Callable[[], bool] = lambda: False,
    **share: Any,
) -> int:
    """Encodes the images that the cache lacks, for `PairLoader(latents=cache)`; equal images are encoded once.

    Args:
        cache: A cache whose settings hold `framing.settings(seed)` and `model_fingerprint(vae)`.
        examples: Examples that are no stream.
        framing: The framing of the loader.
        encode: Function from pixels (n, 3, H, W) in [-1, 1] to named tensors (n, ...), such as the VAE's moments.
        batch_size: Images per call of `encode`.
        seed: The seed of the loader.
        max_broken: Broken images that are left out before an error: a number, or a share.
        stop: Function that is called before each image and batch; filling stops where it returns True.
        share: `rank` and `world_size`, as in `cache.fill`.

    Returns:
        How many entries this process wrote.

    Raises:
        CacheTooLarge: The entries would not fit.
        ValueError: The examples are a stream, or more images are broken than `max_broken`.
    """
    if examples.count is None:
        raise ValueError("a cache of latents needs a data set of known length; encode a stream as it comes")
    (block,) = examples.blocks(block_size=1)
    reader, broken = Reader(framing, seed), BrokenCount(max_broken)
    logger.info("reading %d images for the cache of latents", block.size)
    found: dict[str, tuple[Size, int]] = {}
    for place in range(block.size):
        if stop():
            return 0
        example = block.read(place)
        with broken.skipping(example.name, out_of=block.size):
            fetched = fetch(example.image)
            for size in framing.sizes_of(image_size(fetched)):
                found.setdefault(reader.latents_name(content_id(fetched), size), (size, place))

    def compute(names: list[str]) -> list[dict[str, Tensor] | None]:
        entries: dict[str, dict[str, Tensor]] = {}
        for size, group in groupby(names, key=lambda name: found[name][0]):
            pixels = {}
            for name in group:
                example = block.read(found[name][1])
                with broken.skipping(example.name, out_of=block.size):
                    pixels[name] = reader.cached_pixels(example, size)
            if pixels:
                encoded = encode(torch.stack(list(pixels.values())))
                entries |= {name: {key: encoded[key][row] for key in encoded} for row, name in enumerate(pixels)}
        return [entries.get(name) for name in names]

    return fill(cache, sorted(found, key=lambda name: found[name]), compute, batch_size=batch_size, stop=stop, **share)
