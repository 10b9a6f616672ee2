"""Noisy latents and regression targets of the three diffusion parametrisations.

With clean latents x0, noise n, timestep t in [0, 1000] and noise level (sigma) s = t / 1000:

=============  ===========================  ==================
prediction     noisy latents x_t            target
=============  ===========================  ==================
flow           (1 - s) x0 + s n             n - x0  (velocity)
epsilon        sqrt(a) x0 + sqrt(1 - a) n   n
v_prediction   sqrt(a) x0 + sqrt(1 - a) n   sqrt(a) n - sqrt(1 - a) x0
=============  ===========================  ==================

where a = alphas_cumprod[t] is the table of the scheduler. All values are computed in float32, for any dtype of the
denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Prediction = Literal["flow", "epsilon", "v_prediction"]
TimestepDensity = Literal["uniform", "logit_normal", "shifted"]

NUM_TRAIN_TIMESTEPS = 1000
_LAST_TIMESTEP = 999.9999  # the largest sampled timestep; in float32 still below 1000


@dataclass(frozen=True, eq=False)
class Noising:
    """How a scheduler adds noise to latents, and what its denoiser predicts.

    Attributes:
        prediction: Prediction type of the denoiser: `"flow"`, `"epsilon"` or `"v_prediction"`.
        alphas_cumprod: (1000,) float32 in [0, 1]. Signal power per timestep. Defaults to None, for flow matching.
    """

    prediction: Prediction
    alphas_cumprod: Tensor | None = None

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Noising:
        """Returns the noising with which the denoiser of a scheduler was trained.

        Args:
            scheduler: A diffusers scheduler, for example `pipe.scheduler`. Only its config and its `alphas_cumprod`
                are read, so schedulers that rescale their input (Euler, ...) give the noising of training.

        Raises:
            ValueError: The scheduler has another prediction type (such as "sample"), has no `alphas_cumprod`, or does
                not have 1000 training timesteps.
        """
        name, prediction = type(scheduler).__name__, scheduler.config.get("prediction_type")
        steps = scheduler.config.get("num_train_timesteps")
        if steps != NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"soft tokens need a scheduler with {NUM_TRAIN_TIMESTEPS} training timesteps but {name} has {steps}; "
                "load the scheduler that the denoiser was trained with"
            )
        if prediction == "flow_prediction" or any(
            base.__name__.startswith("FlowMatch") for base in type(scheduler).mro()
        ):
            return cls("flow")
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if prediction not in ("epsilon", "v_prediction") or alphas_cumprod is None:
            raise ValueError(
                "training needs a FlowMatch* scheduler, or one with alphas_cumprod and prediction_type 'epsilon' or "
                f"'v_prediction', but {name} has prediction_type {prediction!r} and "
                f"{'no ' if alphas_cumprod is None else ''}alphas_cumprod; give the pipeline its training scheduler, "
                "for example DDPMScheduler.from_config(pipe.scheduler.config)"
            )
        return cls(prediction, torch.as_tensor(alphas_cumprod, dtype=torch.float32))

    def noisy_latents(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Adds noise to latents.

        Args:
            latents: (B, ...) floating. Clean latents x0.
            noise: (B, ...) or (1, ...) floating. Standard normal noise.
            timestep: (B,), (1,) or scalar, on the 0..1000 scale: floating for flow matching, otherwise an integer
                below 1000.

        Returns:
            Noisy latents, (B, ...) float32.

        Raises:
            ValueError: There is neither one timestep nor one per row, or an integer is needed and it is not one.
        """
        signal_scale, noise_scale = self._scales(latents, timestep)
        return signal_scale * latents.float() + noise_scale * noise.float()

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Returns the regression target of the denoiser: velocity, epsilon or v, (B, ...) float32.

        Args:
            latents: (B, ...) floating. Clean latents x0.
            noise: (B, ...) or (1, ...) floating. The noise that was added to them.
            timestep: (B,), (1,) or scalar, on the 0..1000 scale, as for `noisy_latents`.

        Raises:
            ValueError: There is neither one timestep nor one per row, or an integer is needed and it is not one.
        """
        signal_scale, noise_scale = self._scales(latents, timestep)
        if self.prediction == "flow":
            return noise.float() - latents.float()
        if self.prediction == "epsilon":
            return noise.float().expand_as(latents)
        return signal_scale * noise.float() - noise_scale * latents.float()

    def round_timestep(self, timestep: Tensor) -> Tensor:
        """Returns sampled timesteps in the form that the denoiser takes.

        Args:
            timestep: (B,) float32 in [0, 1000).

        Returns:
            The timesteps unchanged for flow matching; otherwise rounded down, (B,) int64 in 0..999.
        """
        return timestep if self.prediction == "flow" else timestep.long()

    def _scales(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factors of the signal and of the noise, each (B or 1, 1, ..., 1) float32."""
        if timestep.ndim > 1 or timestep.numel() not in (1, latents.shape[0]):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} need one timestep or {latents.shape[0]}, one per row, "
                f"but got shape {tuple(timestep.shape)}"
            )
        timestep = timestep.to(latents.device).reshape(-1, *[1] * (latents.ndim - 1))  # (B or 1, 1, ..., 1)
        if self.alphas_cumprod is None:
            sigma = timestep.float() / NUM_TRAIN_TIMESTEPS
            return 1 - sigma, sigma
        if timestep.is_floating_point():
            raise ValueError(
                f"{self.prediction} prediction needs integer timesteps but got {timestep.dtype}; "
                "round them with Noising.round_timestep(timestep)"
            )
        alphas_cumprod = self.alphas_cumprod.to(latents.device)[timestep]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def sample_timesteps(
    num_samples: int,
    *,
    density: TimestepDensity = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 3.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Samples training timesteps t = 1000 s on the CPU, so that a seed gives the same timesteps on every device.

    Args:
        num_samples: Number of timesteps.
        density: Distribution of the noise level s. `"uniform"`: s ~ U[0, 1). `"logit_normal"`: s = sigmoid(z) with
            z ~ N(mean, std). `"shifted"`: s = shift u / (1 + (shift - 1) u) with u ~ U[0, 1). Defaults to `"uniform"`.
        mean: Mean of `"logit_normal"`; values above 0 favour noise. Defaults to 0.
        std: Standard deviation of `"logit_normal"`, positive. Defaults to 1.
        shift: Shift of `"shifted"`, positive; values above 1 favour noise. Defaults to 3, as SD3 samples.
        generator: CPU generator, or a list with one generator per timestep. Defaults to torch's global generator.

    Returns:
        Timesteps, (num_samples,) float32 in [0, 1000). `Noising.round_timestep` converts them to integers if needed.

    Raises:
        ValueError: The density is unknown, or `std` or `shift` is not positive.

    Source:
        SD3, arXiv 2403.03206: section 3.1 (logit-normal) and equation 23 (resolution shift).
    """
    if density not in get_args(TimestepDensity):
        raise ValueError(f"density must be one of {get_args(TimestepDensity)} but got {density!r}")
    if std <= 0 or shift <= 0:
        raise ValueError(f"std and shift must be positive but got std={std} and shift={shift}")
    draw: Any = torch.randn if density == "logit_normal" else torch.rand
    if isinstance(generator, Sequence):
        drawn = [draw(1, generator=one, dtype=torch.float32, device="cpu") for one in generator]
    else:
        drawn = [draw(num_samples, generator=generator, dtype=torch.float32, device="cpu")]
    # Each on its own: the last bit of a sigmoid may depend on how many are computed at once.
    sigma = torch.cat([torch.sigmoid(mean + std * part) for part in drawn] if density == "logit_normal" else drawn)
    if density == "shifted":
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return (NUM_TRAIN_TIMESTEPS * sigma).clamp(max=_LAST_TIMESTEP)
