"""Inversion: the noise from which a pipeline would draw an image, and drawing from it under another prompt.

A deterministic step goes from x at a noisier level to x' = a x + b p(x) at a cleaner one, with the prediction p made
at x (see `levels`). Inversion goes the other way, where x is not known yet. It solves

    x = (x' - b p(x)) / a

by repeated substitution, starting with x = x'. One substitution is what is called DDIM inversion, and Euler inversion
for flow matching: its error falls with the number of steps. With more it falls faster than that, until the round trip
is exact, at the price of one more denoiser call each.

Source: DDIM inversion, arXiv 2105.05233, appendix F; repeated substitution, arXiv 2309.04907.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Conditioner
from ..noising import Prediction
from .guidance import Guided, conditioner_for, guided, negative_texts
from .images import Images, OutputType, check_output_type, read_images, show
from .levels import Step, sampling_steps
from .request import batch_size, steps_to_run, texts


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
        pipe: A text-to-image pipeline that the trainer knows. Its active soft tokens take part.
        image: PIL images, arrays (H, W, 3) or tensors (3, H, W) of numbers in [0, 1], one or a list or a batch.
        prompt: What the image shows, one for all or one per image.
        negative_prompt: What the pipeline takes when it is given none unless given.
        num_inference_steps: Steps from image to noise.
        guidance_scale: 1.0 is none; inversion under strong guidance needs many steps or substitutions.
        num_substitutions: Denoiser calls per step.
        height: In pixels; images are resized to it. Theirs, rounded down to what the denoiser takes, unless given.
        width: Likewise.
        max_sequence_length: Text tokens per prompt where the family leaves a choice; None for the published number.

    Returns:
        Noise latents (n, C, h, w) float32. Pipelines of UNets and SD3 take them as `latents=`, too.

    Raises:
        ValueError: The pipeline has no conditioner, numbers of images and prompts do not go together, or a setting is
            out of range. Nothing has been touched then.
        TypeError: Images or prompts are of a wrong type.
    """
    steps_to_run(num_inference_steps, 1.0)
    if num_substitutions < 1:
        raise ValueError(f"num_substitutions must be at least 1 but got {num_substitutions}")
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
    """Draws images from noise, by DDIM or Euler steps, the inverse of those of `invert`.

    Args:
        pipe: The pipeline. Its active soft tokens take part.
        latents: Noise, (n, C, h, w), of `invert`.
        prompt: What the images shall show, one for all or one per image.
        negative_prompt: What the pipeline takes when it is given none unless given.
        num_inference_steps: Steps from noise to image; as many as in `invert`.
        guidance_scale: 1.0 is none.
        max_sequence_length: Text tokens per prompt where the family leaves a choice; None for the published number.
        output_type: "pil", "pt", "np" or "latent".

    Returns:
        The pictures: a list of PIL images, a tensor (n, 3, H, W) or array (n, H, W, 3) in [0, 1], or latents
        (n, C, h, w) float32.

    Raises:
        ValueError: The pipeline has no conditioner, numbers of latents and prompts do not go together, or a setting is
            out of range.
        TypeError: Prompts are of a wrong type.
    """
    steps_to_run(num_inference_steps, 1.0)
    check_output_type(output_type)
    conditioner = conditioner_for(pipe, guidance_scale, max_sequence_length)
    if latents.ndim != 4:
        raise ValueError(f"latents must be (n, C, h, w) as of invert, but are of shape {tuple(latents.shape)}")
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[2:])
    steps = sampling_steps(conditioner, num_inference_steps, height, width)
    predict = _under(conditioner, prompt, negative_prompt, guidance_scale, images=len(latents))
    latents = latents.to(pipe._execution_device, torch.float32).expand(predict.rows, -1, -1, -1)
    for step in pipe.progress_bar(steps):
        a, b = step.factors(conditioner.noising.prediction)
        latents = a * latents + b * predict(latents, step.timestep)
    pictures = show(conditioner, latents, output_type)
    pipe.maybe_free_model_hooks()
    return pictures


def step_back(
    latents: Tensor,
    step: Step,
    predict: Callable[[Tensor, Tensor], Tensor],
    prediction: Prediction,
    num_substitutions: int,
) -> Tensor:
    """Goes one step from the cleaner level to the noisier one: latents (n, C, h, w) float32 in and out.

    Args:
        latents: x', at the cleaner level.
        step: The step to undo.
        predict: From noisy latents and a scalar timestep to the prediction.
        prediction: What is predicted.
        num_substitutions: How often the equation of the step is used.
    """
    a, b = step.factors(prediction)
    noisier = latents
    for _ in range(num_substitutions):
        noisier = (latents - b * predict(noisier, step.timestep)) / a
    return noisier


def _under(
    conditioner: Conditioner, prompt: Any, negative_prompt: Any, guidance_scale: float, *, images: int
) -> Guided:
    """Returns the denoiser under the prompts, one row for each picture asked for."""
    prompts = texts("prompt", prompt)
    negatives = negative_texts(conditioner, negative_prompt)
    batch = batch_size(**{"images": images, "prompts": len(prompts), "negative prompts": len(negatives or [""])})
    return guided(conditioner, prompts, negatives, guidance_scale, batch=batch)
