"""`evaluate`: draws every prompt in every setting once, scores the images, and writes tables and plots."""

import inspect
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from ..files import check_places
from ..quoting import quoted
from .gallery import Gallery, ImageKey
from .images import grid, plot
from .lengths import check_lengths
from .metrics import Metric, as_metrics
from .prompts import load_prompts
from .result import EvaluationResult
from .scoring import processes, progress_bar, scored
from .settings import AdapterSetting, left_as_found, settings_of, use
from .writing import RESULT_FILES, write_result

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
    """Draws every prompt in every setting, each image once, and scores the images.

    Images that are in `output_dir` are not drawn again: a run that was killed continues where it stopped, and metrics,
    settings, prompts and seeds can be added to a finished run. Under `accelerate launch` each process draws and scores
    a share of the images; the pipeline must then be on `accelerate.PartialState().device`. The pipeline and its
    adapters are left as they were found, also after an error.

    Args:
        pipe: A text-to-image pipeline with its adapters loaded.
        prompts: The prompts, in any form that `load_prompts` takes or returns.
        metrics: Metrics, their names (see `make_metric`), or functions of images and prompts. Defaults to none.
        adapters: The settings to compare: None for the base model, an adapter's name, or weights by name as
            `get_softrepa_adapters` returns them. The first setting is the baseline of all others. Defaults to the base
            model alone.
        output_dir: Folder for the images and tables.
        seeds: Each prompt is drawn once for each seed, from the same noise in every setting. Defaults to 0 alone.
        batch_size: Number of images drawn at once. It does not change them, since each has its own generator. Defaults
            to 1.
        references: Reference images for metrics that are given by name and need them: a folder, or a sequence of files
            or images.
        allow_truncation: Whether prompts may be longer than the pipeline reads; the end of such a prompt is not drawn.
            Defaults to False.
        arguments: Further arguments of the pipeline's call (`num_inference_steps`, `guidance_scale`, `height`, ...).

    Returns:
        The scores. They are also written to `output_dir`: `results.md`, `results.csv`, `results.json`, `grid.png` and,
        where matplotlib is installed, `plot.png`.

    Raises:
        ValueError: A setting, metric or argument is not valid, or `output_dir` holds images that were drawn with
            something else. Nothing has been drawn by then.
        OSError, ImportError: A metric lacks its weights or its package. Nothing has been drawn by then.
    """
    _check(pipe, seeds, batch_size, arguments)
    check_places(output_dir, RESULT_FILES, what="output_dir")
    settings, chosen = settings_of(pipe, adapters), as_metrics(metrics, references)
    gallery = Gallery(output_dir, settings, load_prompts(prompts), list(seeds))
    for metric in chosen:
        metric.check(gallery.prompts)
    if not allow_truncation:
        check_lengths(pipe, gallery.prompts, arguments)
    gallery.describe(pipe, arguments)
    state = processes()
    if state.is_main_process:
        gallery.write_manifest()
    state.wait_for_everyone()
    missing = gallery.missing()
    state.wait_for_everyone()  # no process draws before all have seen the same images missing
    if missing:
        _load_once(chosen, _device_of(pipe))
    with left_as_found(pipe):
        _draw(pipe, gallery, missing, batch_size, arguments, state)
    state.wait_for_everyone()
    labels = [setting.label for setting in settings]
    keys = gallery.keys
    result = scored(
        labels, gallery.prompts, gallery.seeds, lambda number: gallery.open(keys[number]), chosen, _device_of(pipe)
    )
    if state.is_main_process:
        write_result(result, gallery.folder, _grid(gallery), plot(result))
    state.wait_for_everyone()
    return result


def _check(pipe: Any, seeds: Sequence[int], batch_size: int, arguments: Mapping[str, Any]) -> None:
    own = [name for name in _OWN_ARGUMENTS if name in arguments]
    if own:
        raise ValueError(f"evaluate passes {', '.join(own)} to the pipeline itself; leave it out")
    taken = inspect.signature(pipe.__call__).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        foreign = [name for name in arguments if name not in taken]
        if foreign:
            raise ValueError(f"{type(pipe).__name__} takes no {', '.join(foreign)}; leave it out")
    listed = seeds if isinstance(seeds, Sequence | Set) else []
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in listed)
    if not whole or not listed or len(set(listed)) != len(listed) or min(listed) < 0:
        raise ValueError(
            f"seeds must be a list of different whole numbers of at least 0, such as [0, 1, 2], but is {quoted(seeds)}"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, but is {quoted(batch_size)}")


def _load_once(metrics: Sequence[Metric], device: torch.device) -> None:
    """Loads every metric once, so that missing weights and packages are noticed before hours of drawing."""
    for metric in metrics:
        try:
            metric.setup(device)
        finally:
            metric.close()


# Drawing.


def _draw(
    pipe: Any,
    gallery: Gallery,
    missing: Sequence[ImageKey],
    batch_size: int,
    arguments: Mapping[str, Any],
    state: PartialState,
) -> None:
    batches = list(_batches(missing, batch_size))[state.process_index :: state.num_processes]
    left = sum(map(len, batches))
    if len(missing) < len(gallery.keys) and state.is_main_process:
        logger.info("%d of %d images are already there", len(gallery.keys) - len(missing), len(gallery.keys))
    began, timed = math.nan, 0
    with progress_bar("drawing", left) as progress:
        for number, batch in enumerate(batches):
            use(pipe, gallery.settings[batch[0].setting])
            for key, image in zip(batch, _drawn(pipe, gallery, batch, arguments), strict=True):
                gallery.save(key, image)
            progress.update(len(batch))
            left -= len(batch)
            if number == 0:
                began = time.perf_counter()
            else:
                timed += len(batch)
            if number == _FORECAST_AFTER and left and state.is_main_process:
                seconds = (time.perf_counter() - began) / timed
                hours = seconds * left / 3600
                logger.info("%.2f s per image and process: the remaining %d take about %.2g h", seconds, left, hours)


def _batches(keys: Sequence[ImageKey], size: int) -> Iterator[list[ImageKey]]:
    """Yields the keys in batches of one setting each."""
    for _, group in groupby(keys, key=lambda key: key.setting):
        same = list(group)
        yield from (same[at : at + size] for at in range(0, len(same), size))


def _drawn(pipe: Any, gallery: Gallery, batch: Sequence[ImageKey], arguments: Mapping[str, Any]) -> list[Any]:
    """Returns a newly drawn image for each key."""
    generators = [torch.Generator().manual_seed(gallery.generator_seed(key)) for key in batch]
    texts = [gallery.prompts[key.prompt].text for key in batch]
    output = pipe(prompt=texts, generator=generators, output_type="pil", **arguments)
    if not hasattr(output, "images"):
        raise ValueError(
            f"evaluate needs a pipeline that returns images, but {type(pipe).__name__} returns {type(output).__name__}"
        )
    if len(output.images) != len(batch):
        raise ValueError(
            f"the pipeline drew {len(output.images)} images for {len(batch)} prompts; it must draw one for each"
        )
    blackened = sum(map(bool, getattr(output, "nsfw_content_detected", None) or []))
    if blackened:
        logger.warning(
            "the safety checker made %d images black; they are kept and scored as they are. Load the pipeline with "
            "safety_checker=None to measure the model itself",
            blackened,
        )
    return list(output.images)


def _device_of(pipe: Any) -> torch.device:
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


def _grid(gallery: Gallery, rows: int = 8) -> Image.Image:
    """Returns the first prompts in all settings, drawn with the first seed."""
    shown = range(min(rows, len(gallery.prompts)))
    images = [
        [gallery.open(ImageKey(setting, prompt, 0)) for setting in range(len(gallery.settings))] for prompt in shown
    ]
    heads = [setting.label for setting in gallery.settings]
    return grid(images, [gallery.prompts[prompt].text for prompt in shown], heads)
