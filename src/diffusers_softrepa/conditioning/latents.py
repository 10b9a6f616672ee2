"""Encoding and decoding with the VAE of a pipeline, and the normalisation of latents."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor

from ..compat import get_module_execution_device


def vae_latents(vae: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Returns the latents of images before normalisation, (n, C, h, w) float32.

    Args:
        vae: The VAE.
        pixels: (n, 3, H, W) floating in [-1, 1].
        generator: Random generator for a sample of the posterior. None for the mode of the posterior.
    """
    with _float32_where_needed(vae):
        encoded = vae.encode(pixels.to(get_module_execution_device(vae), vae.dtype))
        return retrieve_latents(encoded, generator, "argmax" if generator is None else "sample").float()


def vae_pixels(vae: Any, latents: Tensor) -> Tensor:
    """Returns the pixels of latents, (n, 3, H, W) float32.

    Args:
        vae: The VAE.
        latents: (n, C, h, w) before normalisation, on the device of the VAE.
    """
    with _float32_where_needed(vae):
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()


def normalised(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Returns latents, (n, C, h, w), shifted and scaled as the config of the VAE says."""
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor", 1.0)
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return (latents - shift) * scale
    mean = latents.new_tensor(config["latents_mean"]).view(-1, 1, 1)  # (C, 1, 1)
    std = latents.new_tensor(config["latents_std"]).view(-1, 1, 1)  # (C, 1, 1)
    return (latents - mean) * scale / std


def denormalised(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Returns latents, (n, C, h, w), before normalisation; the inverse of `normalised`."""
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor", 1.0)
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return latents / scale + shift
    mean = latents.new_tensor(config["latents_mean"]).view(-1, 1, 1)  # (C, 1, 1)
    std = latents.new_tensor(config["latents_std"]).view(-1, 1, 1)  # (C, 1, 1)
    return latents * std / scale + mean


@contextmanager
def _float32_where_needed(vae: Any) -> Iterator[None]:
    """Context manager that runs a float16 VAE in float32 if it overflows in float16, as SDXL's does."""
    needed = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if needed:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if needed:
            vae.to(torch.float16)
