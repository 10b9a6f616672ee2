"""Latents and encoded captions of loaded examples, from a cache where the settings ask for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
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
from .cache import ENCODE_BATCH_SIZE, TensorCache, model_fingerprint
from .dataset import Example, Examples
from .image import Framing
from .loader import PairLoader


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

    Raises:
        ValueError: The pipeline has no text encoders, and there is no cache of captions to use instead.
    """

    def __init__(
        self, args: ContrastiveFlowMatchingArguments, conditioner: Conditioner, framing: Framing, device: torch.device
    ) -> None:
        self._args, self._conditioner, self._device = args, conditioner, device
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
        if cached := [example.latents["latents"] for example in examples if example.latents is not None]:
            return torch.stack(cached).to(self._device, torch.float32)
        pixels = torch.stack([example.pixels for example in examples if example.pixels is not None])
        drawn: Any = list(generators)
        return self._conditioner.encode_images(pixels, drawn).to(self._device)

    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """Returns the encoded captions, one row for each."""
        distinct = list(dict.fromkeys(captions))
        encoded = self._encoded(distinct) if self.text is None else self._cached(self.text, distinct)
        row = {caption: number for number, caption in enumerate(distinct)}
        rows = torch.tensor([row[caption] for caption in captions], device=self._device)
        return {name: value.to(self._device)[rows] for name, value in encoded.items()}

    def fill(
        self,
        loader: PairLoader,
        accelerator: Accelerator,
        *,
        eval_examples: Examples | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Computes what the caches lack, a share in each process.

        Args:
            loader: The training batches.
            accelerator: The accelerator, which knows the processes.
            eval_examples: The evaluation data, whose captions are cached too; defaults to None.
            stop: Function that is called before each batch; filling stops where it returns True.

        Raises:
            CacheTooLarge: The entries need more than `max_cache_gigabytes`, or than the disk has free.
            ValueError: The examples are a stream, too many images are broken, or the pipeline has no text encoders and
                the cache lacks captions.
        """
        if self.latents is not None:
            loader.fill_latents(lambda pixels: {"latents": self._conditioner.encode_images(pixels)}, stop=stop)
        if self.text is not None:
            data = [loader.examples] if eval_examples is None else [loader.examples, eval_examples]
            captions = [text for examples in data for text in examples.captions()]
            captions += [""] * (self._args.proportion_empty_prompts > 0)
            rank, world_size = accelerator.process_index, accelerator.num_processes
            self._fill(self.text, captions, rank=rank, world_size=world_size, stop=stop)
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
            return concatenate([self._conditioner.encode_captions(part) for part in parts])

    def _cached(self, cache: TensorCache, captions: list[str]) -> Conditions:
        self._fill(cache, captions)
        entries = [entry for caption in captions if (entry := cache.get(caption)) is not None]
        if len(entries) < len(captions):  # the cache was deleted meanwhile
            return self._encoded(captions)
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    def _fill(self, cache: TensorCache, captions: Sequence[str], **share: Any) -> None:
        """Encodes the captions that the cache lacks; `share` and errors as in `TensorCache.fill`."""
        missing = cache.missing(captions)
        if missing and self._absent:
            raise ValueError(
                f"the pipeline has no {', '.join(self._absent)}, and {cache.folder} lacks {len(missing)} captions, "
                f"such as {quoted(missing[0])}; load the pipeline with its text encoders once to encode them"
            )

        def encode(names: list[str]) -> dict[str, Conditions]:
            encoded = self._conditioner.encode_captions(names)
            return {text: {name: value[row] for name, value in encoded.items()} for row, text in enumerate(names)}

        if missing:
            with text_encoders_on(self._conditioner.pipeline, self._device):
                cache.fill(captions, encode, **share)
