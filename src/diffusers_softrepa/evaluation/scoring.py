"""Scores of images that have been drawn, with a share in each process; and `score`, for images drawn elsewhere."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..quoting import quoted
from .metrics import ImageMetric, Metric, SetMetric, as_metrics
from .metrics.metric import check_image, named_scores, opened
from .prompts import Prompt, load_prompts
from .result import EvaluationResult


def score(
    images: Mapping[str, Sequence[Any]],
    prompts: Any,
    metrics: Sequence[Any],
    *,
    references: str | Path | Sequence[Any] | None = None,
    device: str | torch.device = "cpu",
) -> EvaluationResult:
    """Scores images that were drawn elsewhere, such as edited images.

    Args:
        images: Files or images by setting, one for each prompt in the order of the prompts.
        prompts: The prompts, in any form that `load_prompts` takes or returns.
        metrics: Metrics, their names (see `make_metric`), or functions of images and prompts.
        references: Reference images for metrics that are given by name and need them: a folder, or a sequence of files
            or images.
        device: Device that the metrics run on. Defaults to the CPU.

    Returns:
        The scores; the first setting is the baseline of all others.

    Raises:
        ValueError: A setting does not have one image for each prompt.
        OSError, ImportError: A metric lacks its weights or its package.
    """
    asked = load_prompts(prompts)
    if not isinstance(images, Mapping) or not images:
        raise ValueError(f"images to score must be a mapping of settings to lists of images, but are {quoted(images)}")
    for label, given in images.items():
        if isinstance(given, str) or len(given) != len(asked):
            raise ValueError(
                f"each setting needs an image for each of {len(asked)} prompts, but {label} has {len(given)}"
            )
    flat = [image for given in images.values() for image in given]
    for image in flat:
        check_image(image)  # before a metric is loaded
    chosen = as_metrics(metrics, references)
    for metric in chosen:
        metric.check(asked)
    return scored(list(images), asked, [0], lambda number: opened(flat[number]), chosen, torch.device(device))


def processes() -> PartialState:
    """Returns the state of the processes that share the work; without an accelerator they communicate through gloo."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def progress_bar(name: str, total: int) -> Any:
    """Returns a progress bar that only the main process shows."""
    return tqdm(total=total, desc=name, disable=not processes().is_main_process or not total, file=sys.stderr)


def scored(
    labels: Sequence[str],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    open_image: Callable[[int], Image.Image],
    metrics: Sequence[Metric],
    device: torch.device,
) -> EvaluationResult:
    """Returns the scores of images, the same in every process.

    Args:
        labels: Labels of the settings.
        prompts: The prompts.
        seeds: The seeds.
        open_image: Returns the image of a number. Images are numbered by setting, then prompt, then seed.
        metrics: Metrics that score the images; only one is loaded at a time.
        device: Device that the metrics run on.

    Raises:
        ValueError: Two metrics return scores of the same name.
    """
    shape = (len(labels), len(prompts), len(seeds))
    prompt_of = [prompt for _ in labels for prompt in prompts for _ in seeds]
    scores: dict[str, Tensor] = {}
    distances: dict[str, list[float]] = {}
    directions: dict[str, bool] = {}
    sources: dict[str, str] = {}
    for metric in metrics:
        metric.setup(device)
        try:
            if isinstance(metric, ImageMetric):
                found = _image_scores(metric, open_image, prompt_of)
                scores |= {name: values.reshape(shape) for name, values in found.items()}
                names = list(found)
            elif isinstance(metric, SetMetric):
                distances[metric.name] = _distances(metric, open_image, len(prompt_of), len(labels))
                names = [metric.name]
            else:
                raise TypeError(f"{metric.name} must be an ImageMetric or a SetMetric")
        finally:
            metric.close()
        twice = sorted(directions.keys() & set(names))
        if twice:
            raise ValueError(f"two metrics return scores named {', '.join(twice)}; pass another name= to one of them")
        directions |= dict.fromkeys(names, metric.higher_is_better)
        sources |= dict.fromkeys(names, metric.reference)
    return EvaluationResult(
        settings=list(labels),
        prompts=[prompt.id for prompt in prompts],
        texts=[prompt.text for prompt in prompts],
        categories=[prompt.category for prompt in prompts],
        seeds=list(seeds),
        scores=scores,
        distances=distances,
        directions=directions,
        references=sources,
    )


def _shares(metric: Metric, count: int) -> Iterator[list[int]]:
    """Yields the numbers of the images that this process scores, in batches."""
    state = processes()
    own = list(range(count))[state.process_index :: state.num_processes]
    with progress_bar(metric.name, len(own)) as progress:
        for at in range(0, len(own), metric.batch_size):
            batch = own[at : at + metric.batch_size]
            yield batch
            progress.update(len(batch))


def _image_scores(
    metric: ImageMetric, open_image: Callable[[int], Image.Image], prompts: Sequence[Prompt]
) -> dict[str, Tensor]:
    """Returns the scores of all images by name, each (number of images,) float64."""
    entries: list[tuple[str, int, float]] = []
    for batch in _shares(metric, len(prompts)):
        images = [open_image(number) for number in batch]
        for name, values in named_scores(metric, images, [prompts[number] for number in batch]).items():
            entries += [(name, number, value) for number, value in zip(batch, values.tolist(), strict=True)]
    scores: dict[str, Tensor] = {}
    for name, number, value in gather_object(entries):
        if name not in scores:
            scores[name] = torch.full((len(prompts),), math.nan, dtype=torch.float64)
        scores[name][number] = value
    return scores


def _distances(
    metric: SetMetric, open_image: Callable[[int], Image.Image], count: int, num_settings: int
) -> list[float]:
    """Returns the distance of each setting's images to the reference images."""
    entries: list[tuple[int, Any]] = []
    for batch in _shares(metric, count):
        features = metric.features([open_image(number) for number in batch])
        entries += list(zip(batch, features.numpy(), strict=True))
    gathered = dict(gather_object(entries))
    features = torch.stack([torch.from_numpy(gathered[number]) for number in range(count)])
    references = metric.reference_features()
    return [metric.distance(part, references) for part in features.chunk(num_settings)]
