"""`evaluate`: draw every prompt in every setting once, score the pictures, write tables and pictures."""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from .gallery import Gallery, Picture
from .images import grid, plot
from .lengths import check_lengths
from .metrics import Metric, as_metrics
from .prompts import load_prompts
from .result import EvaluationResult
from .scoring import processes, progress_bar, scored
from .settings import AdapterSetting, left_as_found, settings_of, use
from .writing import write_result

logger = logging.getLogger(__name__)

_OWN_ARGUMENTS = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "latents")
_FORECAST_AFTER = 2  # batches; the first one of a process is slower than the others


def evaluate(
    pipe: Any,
    prompts: Any,
    metrics: Sequence[Any] = (),
    adapters: Sequence[AdapterSetting] = (None,),
    *,
    output_dir: str | os.PathLike[str],
    seeds: Sequence[int] = (0,),
    batch_size: int = 1,
    references: str | Path | Sequence[Any] | None = None,
    allow_truncation: bool = False,
    **arguments: Any,
) -> EvaluationResult:
    """Draws every prompt in every setting, each picture once, and scores the pictures.

    A run that was killed goes on where it stopped, and metrics, settings, prompts and seeds may be added to a run that
    has ended: what is in `output_dir` is not drawn again. Started by `accelerate launch` on several processes, each
    draws and scores a share; the pipeline must then be on `accelerate.PartialState().device`. The pipeline is left as
    it was found, also after an error.

    Args:
        pipe: A text-to-image pipeline with its adapters loaded.
        prompts: What `load_prompts` takes or returns.
        metrics: Metrics, their names (see `make_metric`), or functions of pictures and prompts.
        adapters: The settings to compare: None for the base model, an adapter's name, or weights by name. The others
            are compared with the first.
        output_dir: Folder of the pictures and tables.
        seeds: A picture is drawn for each, from the same noise in every setting.
        batch_size: Pictures drawn at once; it does not change them, as each has its own generator.
        references: Reference pictures of the metrics that are given by name and need them: a folder, or a sequence.
        allow_truncation: Whether prompts may be longer than the pipeline reads; the rest of them is not drawn.
        arguments: What the pipeline is called with (num_inference_steps, guidance_scale, height, ...).

    Returns:
        The scores, also written to `output_dir`: `results.md`, `results.csv`, `results.json`, `grid.png` and, where
        matplotlib is installed, `plot.png`.

    Raises:
        ValueError: A setting, metric or argument is not as it should be, or `output_dir` holds pictures that were
            drawn with something else; nothing has been drawn by then.
        OSError, ImportError: What a metric needs is missing; likewise.
    """
    _check(seeds, batch_size, arguments)
    settings, chosen = settings_of(pipe, adapters), as_metrics(metrics, references)
    gallery = Gallery(output_dir, settings, load_prompts(prompts), list(seeds))
    for metric in chosen:
        metric.check(gallery.prompts)
    if not allow_truncation:
        check_lengths(pipe, gallery.prompts, arguments)
    gallery.describe(pipe, arguments)
    state = processes()
    if state.is_main_process:
        gallery.settle()
    state.wait_for_everyone()
    missing = gallery.missing()
    state.wait_for_everyone()  # every process has seen the same pictures missing
    if missing:
        _try_out(chosen, _device_of(pipe))
    with left_as_found(pipe):
        _draw(pipe, gallery, missing, batch_size, arguments, state)
    state.wait_for_everyone()
    labels = [setting.label for setting in settings]
    pictures = gallery.pictures
    result = scored(
        labels, gallery.prompts, gallery.seeds, lambda number: gallery.open(pictures[number]), chosen, _device_of(pipe)
    )
    if state.is_main_process:
        write_result(result, gallery.folder, _grid(gallery), plot(result))
    state.wait_for_everyone()
    return result


def _check(seeds: Sequence[int], batch_size: int, arguments: Mapping[str, Any]) -> None:
    own = [name for name in _OWN_ARGUMENTS if name in arguments]
    if own:
        raise ValueError(f"evaluate gives the pipeline {', '.join(own)} itself; leave it out")
    whole = not isinstance(seeds, int) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(
            f"seeds must be a list of different numbers such as [0, 1, 2], but is {seeds!r}; each is a whole "
            "number of at least 0"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}")


def _try_out(metrics: Sequence[Metric], device: torch.device) -> None:
    """Loads every metric once, so that what is missing shows before hours of drawing."""
    for metric in metrics:
        try:
            metric.setup(device)
        finally:
            metric.close()


# Drawing.


def _draw(
    pipe: Any,
    gallery: Gallery,
    missing: Sequence[Picture],
    batch_size: int,
    arguments: Mapping[str, Any],
    state: PartialState,
) -> None:
    batches = list(_batches(missing, batch_size))[state.process_index :: state.num_processes]
    left = sum(map(len, batches))
    if len(missing) < len(gallery.pictures) and state.is_main_process:
        logger.info("%d of %d pictures are there already", len(gallery.pictures) - len(missing), len(gallery.pictures))
    began, timed = math.nan, 0
    with progress_bar("drawing", left) as progress:
        for number, batch in enumerate(batches):
            use(pipe, gallery.settings[batch[0].setting])
            for picture, image in zip(batch, _pictures(pipe, gallery, batch, arguments), strict=True):
                gallery.save(picture, image)
            progress.update(len(batch))
            left -= len(batch)
            if number == 0:
                began = time.perf_counter()
            else:
                timed += len(batch)
            if number == _FORECAST_AFTER and left and state.is_main_process:
                seconds = (time.perf_counter() - began) / timed
                hours = seconds * left / 3600
                logger.info("%.2f s a picture and process: the %d left take about %.2g h", seconds, left, hours)


def _batches(pictures: Sequence[Picture], size: int) -> Iterator[list[Picture]]:
    """Yields the pictures in batches of one setting each."""
    for _, group in groupby(pictures, key=lambda picture: picture.setting):
        same = list(group)
        yield from (same[at : at + size] for at in range(0, len(same), size))


def _pictures(pipe: Any, gallery: Gallery, batch: Sequence[Picture], arguments: Mapping[str, Any]) -> list[Any]:
    generators = [torch.Generator().manual_seed(gallery.generator_seed(picture)) for picture in batch]
    texts = [gallery.prompts[picture.prompt].text for picture in batch]
    output = pipe(prompt=texts, generator=generators, output_type="pil", **arguments)
    if not hasattr(output, "images"):
        raise ValueError(f"evaluate measures pictures, but {type(pipe).__name__} returns {type(output).__name__}")
    if len(output.images) != len(batch):
        raise ValueError(
            f"the pipeline drew {len(output.images)} pictures for {len(batch)} prompts; it must draw one each"
        )
    blackened = sum(map(bool, getattr(output, "nsfw_content_detected", None) or []))
    if blackened:
        logger.warning(
            "the safety checker made %d pictures black, which counts as drawn; load the pipeline with "
            "safety_checker=None to measure the model itself",
            blackened,
        )
    return list(output.images)


def _device_of(pipe: Any) -> torch.device:
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


def _grid(gallery: Gallery, rows: int = 8) -> Any:
    """Returns the first prompts side by side, from the first seed."""
    shown = range(min(rows, len(gallery.prompts)))
    pictures = [
        [gallery.open(Picture(setting, prompt, 0)) for setting in range(len(gallery.settings))] for prompt in shown
    ]
    heads = [setting.label for setting in gallery.settings]
    return grid(pictures, [gallery.prompts[prompt].text for prompt in shown], heads)
