"""`evaluate`: draw every prompt in every setting once, score the pictures, write tables and pictures."""

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm import tqdm

from .gallery import Gallery, Picture
from .metrics import ImageMetric, Metric, SetMetric, as_metrics
from .metrics.metric import named_scores
from .pictures import grid, plot
from .prompts import load_prompts
from .result import EvaluationResult
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
        arguments: What the pipeline is called with (num_inference_steps, guidance_scale, height, ...).

    Returns:
        The scores, also written to `output_dir`: `results.md`, `results.csv`, `results.json`, `grid.png` and, where
        matplotlib is installed, `plot.png`.

    Raises:
        ValueError: A setting, metric or argument is not as it should be, or `output_dir` holds pictures that were
            drawn with something else; nothing has been drawn by then.
        OSError, ImportError: What a metric needs is missing; the pictures are kept.
    """
    _check(seeds, batch_size, arguments)
    settings, chosen = settings_of(pipe, adapters), as_metrics(metrics, references)
    gallery = Gallery(output_dir, settings, load_prompts(prompts), list(seeds))
    state = _processes()
    if state.is_main_process:
        gallery.settle(pipe, arguments)
    state.wait_for_everyone()
    missing = gallery.missing()
    state.wait_for_everyone()  # every process has seen the same pictures missing
    with left_as_found(pipe):
        _draw(pipe, gallery, missing, batch_size, arguments, state)
    state.wait_for_everyone()
    result = _scored(gallery, chosen, _device_of(pipe), state)
    if state.is_main_process:
        write_result(result, gallery.folder, _grid(gallery), plot(result))
    state.wait_for_everyone()
    return result


def _check(seeds: Sequence[int], batch_size: int, arguments: Mapping[str, Any]) -> None:
    own = [name for name in _OWN_ARGUMENTS if name in arguments]
    if own:
        raise ValueError(f"evaluate gives the pipeline {', '.join(own)} itself; leave it out")
    if isinstance(seeds, int) or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be a list of different numbers such as [0, 1, 2], but is {seeds!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}")


def _processes() -> PartialState:
    """Returns the processes that share the work; without an accelerator those that talk through gloo."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


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
    with _progress("drawing", left, state) as progress:
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
    images = pipe(prompt=texts, generator=generators, output_type="pil", **arguments).images
    if len(images) != len(batch):
        raise ValueError(f"the pipeline drew {len(images)} pictures for {len(batch)} prompts; it must draw one each")
    return list(images)


# Scoring.


def _scored(
    gallery: Gallery, metrics: Sequence[Metric], device: torch.device, state: PartialState
) -> EvaluationResult:
    shape = (len(gallery.settings), len(gallery.prompts), len(gallery.seeds))
    scores: dict[str, torch.Tensor] = {}
    distances: dict[str, list[float]] = {}
    directions: dict[str, bool] = {}
    sources: dict[str, str] = {}
    for metric in metrics:
        metric.setup(device)
        try:
            if isinstance(metric, ImageMetric):
                found = {name: value.reshape(shape) for name, value in _image_scores(metric, gallery, state).items()}
                scores |= found
                names = list(found)
            elif isinstance(metric, SetMetric):
                distances[metric.name] = _distances(metric, gallery, state)
                names = [metric.name]
            else:
                raise TypeError(f"{metric.name} must be an ImageMetric or a SetMetric")
        finally:
            metric.close()
        directions |= dict.fromkeys(names, metric.higher_is_better)
        sources |= dict.fromkeys(names, metric.reference)
    return EvaluationResult(
        settings=[setting.label for setting in gallery.settings],
        prompts=[prompt.id for prompt in gallery.prompts],
        texts=[prompt.text for prompt in gallery.prompts],
        categories=[prompt.category for prompt in gallery.prompts],
        seeds=list(gallery.seeds),
        scores=scores,
        distances=distances,
        directions=directions,
        references=sources,
    )


def _shares(gallery: Gallery, metric: Metric, state: PartialState) -> Iterator[list[tuple[int, Picture]]]:
    """Yields this process's pictures with their numbers, in batches."""
    own = list(enumerate(gallery.pictures))[state.process_index :: state.num_processes]
    with _progress(metric.name, len(own), state) as progress:
        for at in range(0, len(own), metric.batch_size):
            batch = own[at : at + metric.batch_size]
            yield batch
            progress.update(len(batch))


def _image_scores(metric: ImageMetric, gallery: Gallery, state: PartialState) -> dict[str, torch.Tensor]:
    """Returns the scores of all pictures by name, (pictures,)."""
    entries: list[tuple[str, int, float]] = []
    for batch in _shares(gallery, metric, state):
        images = [gallery.open(picture) for _, picture in batch]
        prompts = [gallery.prompts[picture.prompt] for _, picture in batch]
        for name, values in named_scores(metric, images, prompts).items():
            entries += [(name, number, value) for (number, _), value in zip(batch, values.tolist(), strict=True)]
    gathered = gather_object(entries)
    scores: dict[str, torch.Tensor] = {}
    for name, number, value in gathered:
        if name not in scores:
            scores[name] = torch.full((len(gallery.pictures),), math.nan, dtype=torch.float64)
        scores[name][number] = value
    return scores


def _distances(metric: SetMetric, gallery: Gallery, state: PartialState) -> list[float]:
    """Returns the distance of each setting's pictures to the reference pictures."""
    entries: list[tuple[int, Any]] = []
    for batch in _shares(gallery, metric, state):
        features = metric.features([gallery.open(picture) for _, picture in batch])
        entries += [(number, row) for (number, _), row in zip(batch, features.numpy(), strict=True)]
    gathered = dict(gather_object(entries))
    features = torch.stack([torch.from_numpy(gathered[number]) for number in range(len(gallery.pictures))])
    references = metric.reference_features()
    return [metric.distance(part, references) for part in features.chunk(len(gallery.settings))]


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


def _progress(name: str, total: int, state: PartialState) -> Any:
    return tqdm(total=total, desc=name, disable=not state.is_main_process or not total, file=sys.stderr)
