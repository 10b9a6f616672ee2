"""Pictures that a run is judged by: the validation prompts drawn with and without the tokens, and their scores."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image, ImageDraw

from ..evaluation.metrics import ImageMetric, as_metrics
from ..evaluation.metrics.metric import named_scores
from ..evaluation.prompts import load_prompts
from ..files import whole_file
from ..pipeline import denoiser_of, disable_softrepa, enable_softrepa
from .callbacks import TrainerCallback, TrainerState
from .log import show
from .preparation import encoders_at_hand

VALIDATION_FOLDER = "validation"
_CAPTION_HEIGHT = 16


@final
class ValidationCallback(TrainerCallback):
    """Draws the validation prompts at every evaluation, on the main process, and scores what it drew.

    Args:
        metrics: Of single pictures, as `evaluation.evaluate` takes them.

    Raises:
        ValueError: A metric is a distance between sets, which a few validation pictures have no use for.
    """

    def __init__(self, metrics: Sequence[Any] = ()) -> None:
        found = as_metrics(metrics)
        self._metrics = [metric for metric in found if isinstance(metric, ImageMetric)]
        wrong = [metric.name for metric in found if metric not in self._metrics]
        if wrong:
            raise ValueError(
                f"validation pictures are scored one by one, but {wrong} compare whole sets; leave them out"
            )

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        trainer, prompts = given["trainer"], args.validation_prompts
        if not (state.is_world_process_zero and prompts):
            return
        at_hand = encoders_at_hand(trainer.pipeline, trainer.accelerator.device)
        with trainer.in_average(), torch.no_grad(), at_hand:
            pictures = draw_side_by_side(
                trainer.pipeline,
                prompts,
                seed=args.validation_seed,
                num_inference_steps=args.num_validation_inference_steps,
                settings=trainer.conditioner.sampling(args.validation_guidance_scale),
                size=trainer.framing.sizes[len(trainer.framing.sizes) // 2],
            )
        grid = side_by_side_grid(pictures, prompts)
        save_picture(grid, Path(args.output_dir) / VALIDATION_FOLDER / f"step-{state.global_step:06d}.png")
        show(trainer.accelerator, state.global_step, VALIDATION_FOLDER, grid)
        if figures := score_side_by_side(self._metrics, pictures, prompts, trainer.accelerator.device):
            trainer.log(figures)


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
    with whole_file(path) as file:
        picture.save(file, format="PNG")
