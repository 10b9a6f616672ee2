"""What a run is judged by: pictures with and without the tokens, and held-out pairs told apart."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..evaluation.metrics import ImageMetric, as_metrics
from ..evaluation.metrics.metric import named_scores
from ..evaluation.prompts import load_prompts
from ..objectives import Contrastive, Objective
from ..pairs import mean_by_noise_level, pair_diagnostics
from ..pipeline import denoiser_of, disable_softrepa, enable_softrepa
from .engine import PairBatch

logger = logging.getLogger(__name__)

_SATURATED = 12.0  # exp(-12) is 6e-6
NOISE_LEVEL_EDGES = (250.0, 500.0, 750.0)
_CAPTION_HEIGHT = 16


def draw_side_by_side(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    num_inference_steps: int,
    settings: Mapping[str, Any],
    size: tuple[int, int],
) -> list[tuple[Image.Image, Image.Image]]:
    """Draws each prompt without and with the active adapters, from the same noise, at `size` (height, width).

    Args:
        pipeline: What draws.
        prompts: At least one.
        seed: Of the noise.
        num_inference_steps: Of each picture.
        settings: Further arguments of the pipeline's call: `Conditioner.sampling`.
        size: Of each picture.

    Returns:
        (base, adapter) of each prompt.
    """
    settings = {"num_inference_steps": num_inference_steps, "height": size[0], "width": size[1], **settings}
    denoiser: Any = denoiser_of(pipeline)
    mixed = denoiser.dtype != pipeline.vae.dtype  # pipelines sample in one precision

    def draw(prompt: str) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast(denoiser.device.type, denoiser.dtype) if mixed else nullcontext():
            return pipeline(prompt=prompt, generator=generator, **settings).images[0]

    progress = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        with_tokens = [draw(prompt) for prompt in prompts]
        disable_softrepa(pipeline)
        try:
            without = [draw(prompt) for prompt in prompts]
        finally:
            enable_softrepa(pipeline)
    finally:
        pipeline.set_progress_bar_config(**progress)
    return list(zip(without, with_tokens, strict=True))


def image_metrics(given: Sequence[Any]) -> list[ImageMetric]:
    """Returns metrics of single pictures: as given, by name, or around functions of pictures and prompts.

    Raises:
        ValueError: One is a distance between sets, which a few validation pictures have no use for.
    """
    metrics = as_metrics(given)
    wrong = [metric.name for metric in metrics if not isinstance(metric, ImageMetric)]
    if wrong:
        raise ValueError(f"validation pictures are scored one by one, but {wrong} compare whole sets; leave them out")
    return [metric for metric in metrics if isinstance(metric, ImageMetric)]


def score_side_by_side(
    metrics: Sequence[ImageMetric],
    pictures: Sequence[tuple[Image.Image, Image.Image]],
    prompts: Sequence[str],
    device: torch.device,
) -> dict[str, float]:
    """Returns mean scores: `validation/NAME` with the adapter and `validation/NAME/base` without.

    What a metric loads is let go of before training goes on.
    """
    asked = load_prompts(prompts) if metrics else []
    found: dict[str, float] = {}
    for metric in metrics:
        metric.setup(device)
        try:
            for side, suffix in ((1, ""), (0, "/base")):
                scores = named_scores(metric, [pair[side] for pair in pictures], asked)
                found |= {f"validation/{name}{suffix}": value.nanmean().item() for name, value in scores.items()}
        finally:
            metric.close()
    return found


def side_by_side_grid(pictures: Sequence[tuple[Image.Image, Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """Returns one picture: a row for each prompt, base on the left, adapter on the right, the prompt above."""
    width, height = pictures[0][0].size
    cell = height + _CAPTION_HEIGHT
    grid = Image.new("RGB", (2 * width, cell * len(pictures)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (pair, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        draw.text((2, row * cell + 2), prompt, fill="black")
        for column, picture in enumerate(pair):
            grid.paste(picture, (column * width, row * cell + _CAPTION_HEIGHT))
    return grid


def pictures_of_grid(grid: Image.Image, rows: int) -> list[tuple[Image.Image, Image.Image]]:
    """Returns the pictures of such a grid: (base, adapter) of each row; the inverse of `side_by_side_grid`."""
    width, cell = grid.width // 2, grid.height // max(rows, 1)
    return [
        (
            grid.crop((0, row * cell + _CAPTION_HEIGHT, width, (row + 1) * cell)),
            grid.crop((width, row * cell + _CAPTION_HEIGHT, 2 * width, (row + 1) * cell)),
        )
        for row in range(rows)
        if cell > _CAPTION_HEIGHT
    ]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Saves a picture, with its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def tell_apart(errors: Tensor, batch: PairBatch) -> dict[str, Tensor]:
    """Returns how well the matched captions of a batch are told from the others.

    Args:
        errors: (b, c), NaN for pairs that were not run.
        batch: The pairs.

    Returns:
        `top1`, `margin`, `information`: (b,) each, NaN for rows without a negative; and `timestep` (b,).
    """
    ran = batch.candidates & ~errors.isnan()
    ran |= torch.zeros_like(ran).scatter(1, batch.positive[:, None], True)
    found = pair_diagnostics(errors, batch.positive, ran)
    figures = {"top1": found.top1, "margin": found.margin, "information": found.information}
    return figures | {"timestep": batch.timestep.to(errors)}


def warn_if_saturated(objective: Objective, errors: Tensor, batch: PairBatch) -> None:
    """Says so if a batch's matched errors (b, c) are so large that exponential logits give no gradient."""
    if not isinstance(objective, Contrastive) or objective.logits != "exponential":
        return
    least = errors.gather(1, batch.positive[:, None]).min().item()
    if least > _SATURATED * objective.temperature:
        logger.warning(
            "matched errors are at least %.2g, %.0f times the temperature %.2g: exponential logits are nearly 0 there "
            "and contrast teaches nothing; set logits='linear', or a temperature of about a fifth of the errors",
            *(least, least / objective.temperature, objective.temperature),
        )


def summary(rows: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Returns the means of `tell_apart` over batches, in all and per quarter of the timestep scale.

    Keys are `top1`, `margin`, `information` and `top1/t0-250` and so on; those without any value are left out.
    """
    joined = {name: torch.cat([row[name] for row in rows]).float().cpu() for name in rows[0]}
    timestep = joined.pop("timestep")
    bounds = [0, *(int(edge) for edge in NOISE_LEVEL_EDGES), 1000]
    found = {}
    for name, values in joined.items():
        found[name] = values.nanmean().item()
        _, means = mean_by_noise_level(values, timestep, edges=torch.tensor(NOISE_LEVEL_EDGES))
        for low, high, mean in zip(bounds[:-1], bounds[1:], means.tolist(), strict=True):
            found[f"{name}/t{low}-{high}"] = mean
    return {name: value for name, value in found.items() if value == value}
