"""Inversion: the noise from which a pipeline would draw an image, and drawing from that noise under another prompt.

A deterministic sampling step computes x' = a x + b p(x) at the next lower noise level from x and the prediction p(x)
(see `levels`). Inversion computes x from x', where p(x) is not known. It solves

    x = (x' - b p(x)) / a

by fixed-point iteration from x = x'. A single substitution is DDIM inversion, or Euler inversion for flow matching;
its error falls with the number of steps. Each further substitution costs one denoiser call per step and reduces the
error, until the round trip is exact.

Source: DDIM inversion, arXiv 2105.05233, appendix F; fixed-point iteration, arXiv 2309.04907.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Conditioner
from ..noising import Prediction
from ..quoting import quoted
from .guidance import Guided, conditioner_for, guided, negative_texts
from .images import Images, OutputType, check_output_type, read_images, to_output
from .levels import Step, sampling_steps
from .request import batch_size, check_count, steps_to_run, texts


@torch.no_grad()
def invert(
    pipe: Any,
    image: Images,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    num_substitutions: int = 1,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
) -> Tensor:
    """Returns the noise from which `regenerate` draws the images again, under the same prompt and guidance.

    Args:
        pipe: A text-to-image pipeline of a family that can be trained. Its active soft-token adapters are used.
        image: Images as PIL images, arrays (H, W, 3) or tensors (3, H, W) with values in [0, 1]: one, a list or a
            batch.
        prompt: Prompt that describes the image, one for all images or one for each.
        negative_prompt: Negative prompt. Defaults to the pipeline's default.
        num_inference_steps: Number of steps from image to noise. Defaults to 50.
        guidance_scale: Guidance scale, where 1.0 is no guidance. Inversion with a high scale needs many steps or
            substitutions. Defaults to 1.0.
        num_substitutions: Number of denoiser calls per step. Defaults to 1.
        height: Height in pixels that images are resized to. Defaults to that of the images, rounded down to a multiple
            that the denoiser takes.
        width: Width in pixels that images are resized to. Defaults to that of the images, rounded down to a multiple
            that the denoiser takes.
        max_sequence_length: Number of text tokens per prompt, for families with a choice. Defaults to the published
            number.

    Returns:
        Noise latents (n, C, h, w) float32. Pipelines with a UNet and those of SD3 also take them as `latents`.

    Raises:
        ValueError: The denoiser's family has no conditioner, the numbers of images and prompts do not match, or a
            setting is out of range.
        TypeError: Images or prompts are of a wrong type.
    """
    steps_to_run(num_inference_steps, 1.0)
    check_count("num_substitutions", num_substitutions)
    conditioner = conditioner_for(pipe, guidance_scale, max_sequence_length)
    pixels = read_images(conditioner, image, height, width)
    steps = sampling_steps(conditioner, num_inference_steps, *pixels.shape[2:])
    predict = _under(conditioner, prompt, negative_prompt, guidance_scale, images=len(pixels))
    latents = conditioner.encode_images(pixels).to(pipe._execution_device).expand(predict.rows, -1, -1, -1)
    for step in pipe.progress_bar(steps[::-1]):
        latents = step_back(latents, step, predict, conditioner.noising.prediction, num_substitutions)
    pipe.maybe_free_model_hooks()
    return latents


@torch.no_grad()
def regenerate(
    pipe: Any,
    latents: Tensor,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    max_sequence_length: int | None = None,
    output_type: OutputType = "pil",
) -> Any:
    """Draws images from noise with DDIM or Euler steps, the inverse of the steps of `invert`.

    Args:
        pipe: The text-to-image pipeline that was given to `invert`. Its active soft-token adapters are used.
        latents: Noise latents that `invert` returned, (n, C, h, w).
        prompt: Prompt that describes the images to draw, one for all images or one for each.
        negative_prompt: Negative prompt. Defaults to the pipeline's default.
        num_inference_steps: Number of steps from noise to image, the same as in `invert`. Defaults to 50.
        guidance_scale: Guidance scale, where 1.0 is no guidance. Defaults to 1.0.
        max_sequence_length: Number of text tokens per prompt, for families with a choice. Defaults to the published
            number.
        output_type: "pil", "pt", "np" or "latent". Defaults to "pil".

    Returns:
        The images, as a list of PIL images, a tensor (n, 3, H, W) or array (n, H, W, 3) with values in [0, 1], or
        latents (n, C, h, w) float32.

    Raises:
        ValueError: The denoiser's family has no conditioner, the numbers of latents and prompts do not match, or a
            setting is out of range.
        TypeError: Prompts are of a wrong type.
    """
    steps_to_run(num_inference_steps, 1.0)
    check_output_type(output_type)
    conditioner = conditioner_for(pipe, guidance_scale, max_sequence_length)
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise TypeError(f"latents must be a floating-point tensor, as invert returns it, but are {quoted(latents)}")
    if latents.ndim != 4 or not len(latents):
        raise ValueError(
            f"latents must have the shape (n, C, h, w), as invert returns them, but have {tuple(latents.shape)}"
        )
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[2:])
    steps = sampling_steps(conditioner, num_inference_steps, height, width)
    predict = _under(conditioner, prompt, negative_prompt, guidance_scale, images=len(latents))
    latents = latents.to(pipe._execution_device, torch.float32).expand(predict.rows, -1, -1, -1)
    for step in pipe.progress_bar(steps):
        a, b = step.factors(conditioner.noising.prediction)
        latents = a * latents + b * predict(latents, step.timestep)
    images = to_output(conditioner, latents, output_type)
    pipe.maybe_free_model_hooks()
    return images


def step_back(
    latents: Tensor,
    step: Step,
    predict: Callable[[Tensor, Tensor], Tensor],
    prediction: Prediction,
    num_substitutions: int,
) -> Tensor:
    """Undoes one sampling step.

    Args:
        latents: Latents x' at the lower noise level, (n, C, h, w) float32.
        step: The step to undo.
        predict: Function from noisy latents and a scalar timestep to the prediction.
        prediction: What the denoiser predicts.
        num_substitutions: Number of fixed-point iterations.

    Returns:
        Latents x at the higher noise level, (n, C, h, w) float32.
    """
    a, b = step.factors(prediction)
    noisier = latents
    for _ in range(num_substitutions):
        noisier = (latents - b * predict(noisier, step.timestep)) / a
    return noisier


def _under(
    conditioner: Conditioner, prompt: Any, negative_prompt: Any, guidance_scale: float, *, images: int
) -> Guided:
    """Returns the denoiser with the prompts, one row for each image."""
    prompts = texts("prompt", prompt)
    negatives = negative_texts(conditioner, negative_prompt)
    batch = batch_size(**{"images": images, "prompts": len(prompts), "negative prompts": len(negatives or [""])})
    return guided(conditioner, prompts, negatives, guidance_scale, batch=batch)
