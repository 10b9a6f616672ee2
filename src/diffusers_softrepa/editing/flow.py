"""FlowEdit: edits an image from a source prompt to a target prompt, without inversion, for flow-matching denoisers.

Let x0 be the source latents, v(x, s, prompt) the guided velocity of the denoiser at noise level s, and d = 0. Every
step from s to the next lower level s' draws noise n and moves d by the difference of two velocities:

    x_source = (1 - s) x0 + s n
    x_target = x_source + d
    d       <- d + (s' - s) (v(x_target, s, target prompt) - v(x_source, s, source prompt))

averaged over `num_averages` draws of n. The edited latents are x0 + d. Only the last steps run, a share `strength` of
all, so that the coarse layout of the image is kept. If both prompts and both guidance scales are equal, d stays
exactly 0.

Guidance is that of diffusers: v_u + g (v_c - v_u). SoftREPA's released editing code uses v_c + g (v_c - v_u) under the
target prompt, so a scale of 9 there is a scale of 10 here.

Source: FlowEdit, arXiv 2412.08629, algorithm 1 with n_min = 0; its n_max is `strength` times the number of steps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..quoting import quoted
from .guidance import conditioner_for, guided, negative_texts
from .images import Images, OutputType, check_output_type, read_images, to_output
from .levels import Step, sampling_steps
from .request import Seed, batch_size, check_count, generators, noise_like, steps_to_run, texts

AdapterScope = Literal["both", "target", "none"]
Velocity = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def flow_edit(
    pipe: Any,
    image: Images,
    source_prompt: str | Sequence[str],
    target_prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_inference_steps: int = 50,
    strength: float = 0.66,
    source_guidance_scale: float = 3.5,
    target_guidance_scale: float = 13.5,
    num_averages: int = 1,
    generator: Seed = None,
    adapter_scope: AdapterScope = "both",
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
    output_type: OutputType = "pil",
) -> Any:
    """Edits images from what the source prompt describes to what the target prompt describes.

    One image can be edited by several prompts, several images by one prompt, or each image by its own prompt.

    Args:
        pipe: A text-to-image pipeline whose denoiser was trained by flow matching. Its active soft-token adapters are
            used.
        image: Images as PIL images, arrays (H, W, 3) or tensors (3, H, W) with values in [0, 1]: one, a list or a
            batch.
        source_prompt: Prompt that describes the image.
        target_prompt: Prompt that describes the edited image.
        negative_prompt: Negative prompt of both. Defaults to the pipeline's default.
        num_inference_steps: Number of sampling steps from pure noise to image, of which the last ones run. Defaults to
            50.
        strength: Share of the steps that run, in (0, 1]. A higher share changes more of the image. Defaults to 0.66.
        source_guidance_scale: Guidance scale under the source prompt. Defaults to 3.5.
        target_guidance_scale: Guidance scale under the target prompt. A higher scale changes more of the image.
            Defaults to 13.5.
        num_averages: Number of noise draws per step. Defaults to 1.
        generator: A seed, a generator or a list with a generator for each image. A seed makes a generator for each
            image, so that an image does not depend on the others in its batch. Defaults to unseeded noise.
        adapter_scope: Where the active soft-token adapters are used: under "both" prompts, under the "target" prompt
            only, or under "none". Defaults to "both".
        height: Height in pixels that images are resized to. Defaults to that of the images, rounded down to a multiple
            that the denoiser takes.
        width: Width in pixels that images are resized to. Defaults to that of the images, rounded down to a multiple
            that the denoiser takes.
        max_sequence_length: Number of text tokens per prompt, for families with a choice. Defaults to the published
            number.
        output_type: "pil", "pt", "np" or "latent". Defaults to "pil".

    Returns:
        The edited images, as a list of PIL images, a tensor (n, 3, H, W) or array (n, H, W, 3) with values in [0, 1],
        or latents (n, C, h, w) float32.

    Raises:
        ValueError: The denoiser was not trained by flow matching, its family has no conditioner, the numbers of images
            and prompts do not match, or a setting is out of range.
        TypeError: Images or prompts are of a wrong type.
    """
    running = steps_to_run(num_inference_steps, strength)
    scales = (source_guidance_scale, target_guidance_scale)
    source, target = (conditioner_for(pipe, scale, max_sequence_length) for scale in scales)
    if source.noising.prediction != "flow":
        raise ValueError(
            f"flow_edit needs a denoiser trained by flow matching, but that of this {type(pipe).__name__} predicts "
            f"{source.noising.prediction}; use invert and regenerate"
        )
    if adapter_scope not in get_args(AdapterScope):
        raise ValueError(f"adapter_scope must be one of {get_args(AdapterScope)} but got {quoted(adapter_scope)}")
    check_count("num_averages", num_averages)
    check_output_type(output_type)
    prompts, targets = texts("source_prompt", source_prompt), texts("target_prompt", target_prompt)
    negatives = negative_texts(source, negative_prompt)
    pixels = read_images(source, image, height, width)
    counts = {"images": len(pixels), "source prompts": len(prompts), "target prompts": len(targets)}
    batch = batch_size(**counts, **{"negative prompts": len(negatives or [""])})
    drawing = generators(generator, batch)
    steps = sampling_steps(source, num_inference_steps, *pixels.shape[2:])[-running:]

    adapted = {"source": adapter_scope == "both", "target": adapter_scope != "none"}
    under_source = guided(source, prompts, negatives, scales[0], batch=batch, adapted=adapted["source"])
    under_target = guided(target, targets, negatives, scales[1], batch=batch, adapted=adapted["target"])
    latents = source.encode_images(pixels).to(pipe._execution_device).expand(batch, -1, -1, -1)
    edited = edit_latents(
        latents,
        pipe.progress_bar(steps),
        source=under_source,
        target=under_target,
        noise=noise_like(latents, drawing),
        num_averages=num_averages,
    )
    images = to_output(source, edited, output_type)
    pipe.maybe_free_model_hooks()
    return images


def edit_latents(
    latents: Tensor,
    steps: Iterable[Step],
    *,
    source: Velocity,
    target: Velocity,
    noise: Iterator[Tensor],
    num_averages: int = 1,
) -> Tensor:
    """Edits latents x0 by the steps of a flow-matching schedule.

    Args:
        latents: Source latents x0, (n, C, h, w) float32.
        steps: The steps that run, from noise to image.
        source: Function from noisy latents (n, C, h, w) and a scalar timestep to the guided velocity under the source
            prompts.
        target: Function from noisy latents (n, C, h, w) and a scalar timestep to the guided velocity under the target
            prompts.
        noise: Iterator over draws of noise, (n, C, h, w) or (1, C, h, w), of which each step takes `num_averages`.
        num_averages: Number of draws per step. Defaults to 1.

    Returns:
        Edited latents x0 + d, (n, C, h, w) float32.
    """
    difference = torch.zeros_like(latents)
    for step in steps:
        change = torch.zeros_like(latents)
        for _ in range(num_averages):
            noisy = step.at.signal * latents + step.at.noise * next(noise)
            change += target(noisy + difference, step.timestep) - source(noisy, step.timestep)
        difference += (step.to.noise - step.at.noise) * (change / num_averages)
    return latents + difference
