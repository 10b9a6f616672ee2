"""Noise levels of a sampling loop, and the deterministic step from one level to the next and back.

At a level with signal s and noise n the noisy latents are x = s x0 + n e. A prediction p determines x0 and e:

    flow             x0 = x - n p          e = x + s p       (s + n = 1)
    epsilon          x0 = (x - n p) / s    e = p
    v_prediction     x0 = s x - n p        e = n x + s p     (s^2 + n^2 = 1)

and the step to the level (s', n') combines them again: x' = s' x0 + n' e. This is the Euler step for flow matching and
the DDIM step otherwise. It is linear, x' = a x + b p, and is undone by x = (x' - b p) / a if p is known.

Source: DDIM, arXiv 2010.02502, equation 12 with sigma 0; Progressive Distillation, arXiv 2202.00512, for v.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..conditioning import Conditioner
from ..noising import NUM_TRAIN_TIMESTEPS, Prediction


class Level(NamedTuple):
    """A noise level: the factors of the signal and of the noise, scalar float32 tensors."""

    signal: Tensor
    noise: Tensor


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One step of a sampling loop.

    Attributes:
        timestep: Timestep that is passed to the denoiser, a scalar tensor in 0..1000.
        at: The level that the step starts from, the higher one.
        to: The level that the step leads to, the lower one.
    """

    timestep: Tensor
    at: Level
    to: Level

    def factors(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Returns a and b of the step x' = a x + b p."""
        (signal, noise), (next_signal, next_noise) = self.at, self.to
        if prediction == "flow":
            return next_signal + next_noise, next_noise * signal - next_signal * noise
        if prediction == "epsilon":
            return next_signal / signal, next_noise - next_signal * noise / signal
        return next_signal * signal + next_noise * noise, next_noise * signal - next_signal * noise


def sampling_steps(conditioner: Conditioner, num_inference_steps: int, height: int, width: int) -> list[Step]:
    """Returns the sampling steps of a pipeline, from noise to image.

    Args:
        conditioner: Conditioner of the pipeline. For flow matching the levels are those of the pipeline's scheduler,
            with its shift; otherwise they are those of DDIM for any scheduler.
        num_inference_steps: Number of steps.
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Raises:
        ValueError: The scheduler repeats levels, as second-order schedulers do.
    """
    pipeline: Any = conditioner.pipeline
    if conditioner.noising.prediction != "flow":
        return _ddim_steps(pipeline.scheduler, num_inference_steps)
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(**conditioner.schedule(num_inference_steps, height, width))
    sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float32, device="cpu")
    if len(sigmas) != num_inference_steps + 1 or not bool((sigmas.diff() < 0).all()):
        raise ValueError(
            f"editing needs noise levels that decrease with every step, but {type(scheduler).__name__} makes "
            f"{[round(sigma, 3) for sigma in sigmas.tolist()]} for {num_inference_steps} steps; give the pipeline a "
            "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )
    return _steps(NUM_TRAIN_TIMESTEPS * sigmas[:-1], 1 - sigmas, sigmas)


def _ddim_steps(scheduler: Any, num_inference_steps: int) -> list[Step]:
    ddim: Any = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(num_inference_steps)
    powers = [*ddim.alphas_cumprod[ddim.timesteps], ddim.final_alpha_cumprod]
    power = torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in powers])
    return _steps(ddim.timesteps, power.sqrt(), (1 - power).sqrt())


def _steps(timesteps: Tensor, signal: Tensor, noise: Tensor) -> list[Step]:
    levels = [Level(*pair) for pair in zip(signal, noise, strict=True)]
    return [Step(*parts) for parts in zip(timesteps, levels[:-1], levels[1:], strict=True)]
