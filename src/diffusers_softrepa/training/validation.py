"""Validation images: prompts drawn with and without the soft tokens while training, and their scores."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image

from ..evaluation.images import grid
from ..evaluation.metrics import ImageMetric, as_metrics
from ..evaluation.metrics.metric import named_scores
from ..evaluation.prompts import load_prompts
from ..evaluation.writing import save_image
from ..pipeline import denoiser_of, softrepa_disabled
from .callbacks import TrainerCallback, TrainerState
from .log import show
from .preparation import text_encoders_on

VALIDATION_FOLDER = "validation"
IMAGES_FOLDER = "images"
_HEADS = ("without soft tokens", "with soft tokens")


@final
class ValidationCallback(TrainerCallback):
    """Draws the validation prompts at every evaluation, in the main process, and scores the images.

    `validation/step-<step>.png` shows all prompts; `images/<number>.png` is the newest image of one prompt, with soft
    tokens, for the gallery of the model card.

    Args:
        metrics: Metrics of single images, in the forms that `evaluation.evaluate` takes.

    Raises:
        ValueError: A metric compares sets of images, for which the validation images are too few.
    """

    def __init__(self, metrics: Sequence[Any] = ()) -> None:
        found = as_metrics(metrics)
        self._metrics = [metric for metric in found if isinstance(metric, ImageMetric)]
        wrong = [metric.name for metric in found if metric not in self._metrics]
        if wrong:
            raise ValueError(
                f"validation images are scored one by one, but {wrong} compare whole sets; leave them out"
            )

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        trainer, prompts = given["trainer"], args.validation_prompts
        if not (state.is_world_process_zero and prompts):
            return
        height, width = trainer.framing.sizes[len(trainer.framing.sizes) // 2]
        settings = {
            "num_inference_steps": args.num_validation_inference_steps,
            "height": height,
            "width": width,
            **trainer.conditioner.sampling(args.validation_guidance_scale),
        }
        device = trainer.accelerator.device
        with trainer.in_average(), torch.no_grad(), text_encoders_on(trainer.pipeline, device):
            images = draw_both(trainer.pipeline, prompts, args.validation_seed, settings)
        sheet, folder = grid(images, prompts, _HEADS, max_side=None), Path(args.output_dir)
        save_image(sheet, folder / VALIDATION_FOLDER / f"step-{state.global_step:06d}.png")
        for number, (_, image) in enumerate(images):
            save_image(image, folder / IMAGES_FOLDER / f"{number:02d}.png")
        show(trainer.accelerator, state.global_step, VALIDATION_FOLDER, sheet)
        if figures := _scores(self._metrics, images, prompts, device):
            trainer.log(figures)


def draw_both(
    pipeline: Any, prompts: Sequence[str], seed: int, settings: Mapping[str, Any]
) -> list[tuple[Image.Image, Image.Image]]:
    """Draws each prompt without and with the active adapters, from the same noise.

    Args:
        pipeline: The pipeline that draws.
        prompts: One prompt or more.
        seed: Seed of the noise.
        settings: Further arguments of the pipeline's call.

    Returns:
        The two images of each prompt, the one without soft tokens first.
    """
    denoiser: Any = denoiser_of(pipeline)
    mixed = denoiser.dtype != pipeline.vae.dtype  # pipelines sample in one precision

    def draw() -> list[Image.Image]:
        with torch.autocast(denoiser.device.type, denoiser.dtype) if mixed else nullcontext():
            noise = (torch.Generator().manual_seed(seed) for _ in prompts)
            pairs = zip(prompts, noise, strict=True)
            return [pipeline(prompt=prompt, generator=one, **settings).images[0] for prompt, one in pairs]

    progress = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        with_tokens = draw()
        with softrepa_disabled(pipeline):
            return list(zip(draw(), with_tokens, strict=True))
    finally:
        pipeline.set_progress_bar_config(**progress)


def _scores(
    metrics: Sequence[ImageMetric],
    images: Sequence[tuple[Image.Image, Image.Image]],
    prompts: Sequence[str],
    device: torch.device,
) -> dict[str, float]:
    """Returns the mean scores `validation/NAME` with soft tokens and `validation/NAME/base` without."""
    asked = load_prompts(prompts) if metrics else []
    found: dict[str, float] = {}
    for metric in metrics:
        metric.setup(device)
        try:
            for side, suffix in ((1, ""), (0, "/base")):
                scores = named_scores(metric, [pair[side] for pair in images], asked)
                found |= {f"validation/{name}{suffix}": value.nanmean().item() for name, value in scores.items()}
        finally:
            metric.close()  # its models leave the memory before training continues
    return found
