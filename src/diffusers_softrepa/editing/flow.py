"""FlowEdit: from a source image to one of the target prompt, without inversion, for flow-matching denoisers.

With source latents x0, noise level s, the denoiser's guided velocity v(x, s, prompt), and d = 0 at the start, every
step from s to the next lower s' draws noise n and moves d by the difference of two velocities:

    x_source = (1 - s) x0 + s n
    x_target = x_source + d
    d       <- d + (s' - s) (v(x_target, s, target prompt) - v(x_source, s, source prompt))

averaged over `num_averages` draws of n. The edited latents are x0 + d. Only the last steps run, the share `strength`
of them, so the image's coarse layout stays. Where both prompts and both guidances agree, d stays exactly 0.

Guidance is diffusers': v_u + g (v_c - v_u). SoftREPA's released editing code writes its target branch
v_c + g (v_c - v_u), so a 9 there is a 10 here.

Source: FlowEdit, arXiv 2412.08629, algorithm 1 with n_min = 0; its n_max is `strength` times the number of steps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .guidance import conditioner_for, guided, negative_texts
from .images import Images, OutputType, check_output_type, read_images, show
from .levels import Step, sampling_steps
from .request import Seed, batch_size, generators, noise_like, steps_to_run, texts

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
    """Edits images from what the source prompt says to what the target prompt says.

    One image may be edited by several prompts, several images by one prompt, or each by its own.

    Args:
        pipe: A text-to-image pipeline whose denoiser learned flow matching. Its active soft tokens take part.
        image: PIL images, arrays (H, W, 3) or tensors (3, H, W) of numbers in [0, 1], one or a list or a batch.
        source_prompt: What the image shows.
        target_prompt: What the edited image shall show.
        negative_prompt: Of both; what the pipeline takes when it is given none unless given.
        num_inference_steps: Steps from pure noise to image, of which the last ones run.
        strength: Share of the steps that run, in (0, 1]; more changes more.
        source_guidance_scale: g of the source prompt.
        target_guidance_scale: g of the target prompt; more changes more.
        num_averages: Draws of noise per step.
        generator: A number seeds a generator for each image, so that a picture does not depend on the others of its
            batch; a generator draws for the whole batch; a list has one per image.
        adapter_scope: Where active soft tokens take part: under both prompts, under the target prompt only, or
            nowhere.
        height: In pixels; images are resized to it. Theirs, rounded down to what the denoiser takes, unless given.
        width: Likewise.
        max_sequence_length: Text tokens per prompt where the family leaves a choice; None for the published number.
        output_type: "pil", "pt", "np" or "latent".

    Returns:
        The pictures: a list of PIL images, a tensor (n, 3, H, W) or array (n, H, W, 3) in [0, 1], or latents
        (n, C, h, w) float32.

    Raises:
        ValueError: The denoiser did not learn flow matching or has no conditioner, numbers of images and prompts do
            not go together, or a setting is out of range. Nothing has been touched then.
        TypeError: Images or prompts are of a wrong type.
    """
    running = steps_to_run(num_inference_steps, strength)
    scales = (source_guidance_scale, target_guidance_scale)
    source, target = (conditioner_for(pipe, scale, max_sequence_length) for scale in scales)
    if source.noising.prediction != "flow":
        raise ValueError(
            f"flow_edit needs a denoiser that learned flow matching, but that of this {type(pipe).__name__} predicts "
            f"{source.noising.prediction}; use invert and regenerate"
        )
    if adapter_scope not in get_args(AdapterScope):
        raise ValueError(f"adapter_scope must be one of {get_args(AdapterScope)} but got {adapter_scope!r}")
    if num_averages < 1:
        raise ValueError(f"num_averages must be at least 1 but got {num_averages}")
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
    pictures = show(source, edited, output_type)
    pipe.maybe_free_model_hooks()
    return pictures


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
        latents: x0, (n, C, h, w) float32.
        steps: Those that run, from noise to image.
        source: From noisy latents (n, C, h, w) and a scalar timestep to the guided velocity under the source prompts.
        target: The same under the target prompts.
        noise: Draws n, (n, C, h, w) or (1, C, h, w), `num_averages` of them per step.
        num_averages: Draws per step.

    Returns:
        Edited latents, (n, C, h, w) float32.
    """
    difference = torch.zeros_like(latents)
    for step in steps:
        change = torch.zeros_like(latents)
        for _ in range(num_averages):
            noisy = step.at.signal * latents + step.at.noise * next(noise)
            change += target(noisy + difference, step.timestep) - source(noisy, step.timestep)
        difference += (step.to.noise - step.at.noise) * (change / num_averages)
    return latents + difference
