"""From images and captions to the denoiser's prediction: what the conditioner of every pipeline does.

With the VAE's encoder E, images x, captions c, noise n and timestep t in 0..1000:

    x0 = (E(x) - shift) * scale                `encode_images`
    conditions = text encoders of c            `encode_captions`
    prediction = denoiser(x_t, t, conditions)  `predict`, with x_t = noising.noisy_latents(x0, n, t)

and the prediction is compared to `noising.target(x0, n, t)`, whatever the denoiser's own layout, clock or sign:
latents are (n, C, h, w), timesteps run from 0 (clean) to 1000 (noise), and flow matching predicts n - x0.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from ..compat import get_module_execution_device
from ..denoisers import denoiser_of
from ..families import family_of
from ..noising import Noising
from .conditions import Conditions
from .latents import denormalised, normalised, vae_latents, vae_pixels


class Conditioner(ABC):
    """Calls the parts of one text-to-image pipeline as its own sampling does, for many captions and images at once.

    Components are looked up in the pipeline at every call, so they may be moved, offloaded or, once what they make is
    cached, set to None. One subclass per pipeline class: it states the class variables, defines the abstract members
    and takes what settings it has as keyword arguments whose defaults are the published ones.

    Attributes:
        family: Name of the denoiser's `FamilySpec`.
        pipelines: Names of the pipeline classes it can call; their subclasses count.
        text_components: What `encode_captions` needs of the pipeline; among it `text_encoder`.
        checkpoints_exactly: Whether its denoiser predicts the same under gradient checkpointing.
        sigmas_from_one: Whether it samples at noise levels 1, 1 - 1/n, ..., 1/n, before they are shifted, and not at
            its scheduler's own.
        pipeline: The pipeline.
        noising: How its scheduler noises latents and what its denoiser predicts, read once.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    text_components: ClassVar[tuple[str, ...]]
    checkpoints_exactly: ClassVar[bool] = True
    sigmas_from_one: ClassVar[bool] = False

    def __init__(self, pipeline: Any) -> None:
        """Reads the scheduler.

        Raises:
            ValueError: The scheduler is missing or cannot train, or the denoiser reads more than noisy latents.
        """
        self.pipeline = pipeline
        self._check_present(["scheduler"], "calling the denoiser")
        self.noising = Noising.from_scheduler(pipeline.scheduler)
        made = self.latent_channels if pipeline.vae is None else self._vae_channels
        if made != self.latent_channels:
            raise ValueError(
                f"the denoiser must read what the VAE makes and nothing else, but {type(self.denoiser).__name__} "
                f"reads {self.latent_channels} latent channels and the VAE makes {made}; train the text-to-image "
                "model, not its inpainting or control variant"
            )

    @property
    def denoiser(self) -> nn.Module:
        """The frozen model that soft tokens are attached to, without `torch.compile`'s wrapper."""
        return denoiser_of(self.pipeline)

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels C of latents."""

    @property
    @abstractmethod
    def latent_multiple(self) -> int:
        """What height and width of latents must be multiples of."""

    @property
    def _vae_channels(self) -> int:
        """Channels of what the VAE makes."""
        return self.pipeline.vae.config.latent_channels

    @property
    def image_multiple(self) -> int:
        """What height and width of images must be multiples of, in pixels."""
        return self.pipeline.vae_scale_factor * self.latent_multiple

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Returns the shape (C, h, w) of the latents of an image, height and width in pixels.

        Raises:
            ValueError: A side is not a positive multiple of `image_multiple`.
        """
        multiple = self.image_multiple
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"height and width of images must be multiples of {multiple} px for this "
                f"{type(self.pipeline).__name__}, but are {height} x {width}; resize or crop the images"
            )
        scale = self.pipeline.vae_scale_factor
        return self.latent_channels, height // scale, width // scale

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Conditions:
        """Encodes captions as sampling encodes a prompt; negative prompts have no part in it.

        Args:
            captions: At least one.

        Returns:
            One row per caption, on the text encoder's device and in its dtype, all padded to the same length: rows
            of different calls and processes can be concatenated.

        Raises:
            TypeError: `captions` is not a sequence of strings.
            ValueError: It is empty, or the pipeline lacks a text encoder or tokenizer.
        """
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise TypeError(f"captions must be a list of strings, but are {captions!r}; wrap a single one in a list")
        if len(captions) == 0:
            raise ValueError("captions must be at least one, but the list is empty; leave empty batches out")
        self._check_present(self.text_components, "encoding captions")
        return self._encode(list(captions), get_module_execution_device(self.pipeline.text_encoder))

    @torch.no_grad()
    def encode_negative_prompts(self, prompts: Sequence[str] | None = None) -> Conditions:
        """Encodes negative prompts as sampling does.

        Args:
            prompts: At least one; None for what sampling takes when it is given none, one row.

        Returns:
            As `encode_captions`; rows of both fit together.
        """
        return self.encode_captions([""] if prompts is None else prompts)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encodes images to the latents that the denoiser learned on.

        Args:
            pixels: (n, 3, H, W) floating in [-1, 1], sides multiples of `image_multiple`.
            generator: Draws a sample of the VAE's posterior; without one its mode is taken, the same at every call.

        Returns:
            Latents x0, (n, C, h, w) float32 on the VAE's device.

        Raises:
            ValueError: Shape or dtype of the pixels are wrong, or the pipeline has no VAE.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"pixels must be floating numbers in [-1, 1] of shape (n, 3, H, W), but are {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}; pipe.image_processor.preprocess(images) makes them"
            )
        self.latent_shape(*pixels.shape[2:])
        self._check_present(["vae"], "encoding images")
        return self._encode_pixels(pixels, generator)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes latents of `encode_images`' kind as sampling does.

        Args:
            latents: (n, C, h, w), on any device.

        Returns:
            Pixels (n, 3, H, W) float32 on the VAE's device; in [-1, 1], but for the VAE's overshoot.

        Raises:
            ValueError: The pipeline has no VAE.
        """
        self._check_present(["vae"], "decoding latents")
        return self._decode_latents(latents.to(get_module_execution_device(self.pipeline.vae), torch.float32))

    def schedule(self, num_inference_steps: int, height: int, width: int) -> dict[str, Any]:
        """Returns the arguments that the pipeline's call gives to its scheduler's `set_timesteps`.

        Args:
            num_inference_steps: How many steps.
            height: Of the images, in pixels; a longer sequence may be shifted more.
            width: Likewise.
        """
        config = self.pipeline.scheduler.config
        given: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        if self.sigmas_from_one and not config.get("use_flow_sigmas"):
            given = {"sigmas": [1 - step / num_inference_steps for step in range(num_inference_steps)]}
        if config.get("use_dynamic_shifting"):
            rows = [side // self.image_multiple for side in (height, width)]
            given["mu"] = self._shift(rows[0] * rows[1], num_inference_steps)
        return given

    def predict(self, noisy_latents: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Calls the denoiser once, each row with its own timestep and caption; gradients reach its soft tokens.

        Args:
            noisy_latents: (n, C, h, w), on the device where the denoiser runs.
            timestep: (n,) in 0..1000, on any device.
            conditions: n rows of what `encode_captions` returned, on any device.

        Returns:
            The prediction of `noising.target`, (n, C, h, w) float32.

        Raises:
            ValueError: The shapes do not fit the denoiser or each other, or it checkpoints and must not.
        """
        self._check_call(noisy_latents, timestep, conditions)
        denoiser: Any = self.denoiser
        if not self.checkpoints_exactly and torch.is_grad_enabled() and denoiser.is_gradient_checkpointing:
            self.check_checkpointing()
        device, dtype = noisy_latents.device, denoiser.dtype
        clock = family_of(denoiser).timestep_of(denoiser.config)
        cast = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in conditions.items()
        }
        # Timesteps stay float32 or int64: the denoiser rounds them if it must, the bins of the soft tokens do not.
        own_timestep = timestep.to(device)
        if clock.scale != 1 or clock.reverse or clock.offset:
            own_timestep = clock.of_level(own_timestep.float())
        return self._denoise(noisy_latents.to(dtype), own_timestep, cast).float()

    def sampling(self, guidance_scale: float | None = None) -> dict[str, Any]:
        """Returns the arguments of the pipeline's call that guide, and that keep pictures at the size asked for.

        Args:
            guidance_scale: None for the pipeline's own.
        """
        return {} if guidance_scale is None else {"guidance_scale": guidance_scale}

    def check_checkpointing(self) -> None:
        """Raises ValueError if gradient checkpointing changes what the denoiser predicts."""
        if not self.checkpoints_exactly:
            name = type(self.denoiser).__name__
            raise ValueError(
                f"gradient checkpointing must not change predictions, but that of {name} leaves out the text mask in "
                "some of its blocks, where sampling has it; train without gradient_checkpointing, with a smaller "
                "pair_chunk_size if memory runs out"
            )

    @abstractmethod
    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        """Encodes captions, on `device`."""

    def _encode_pixels(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Encodes and normalises valid pixels; for VAEs that need more than a shift and a scale, override it."""
        vae = self.pipeline.vae
        return normalised(vae_latents(vae, pixels, generator), vae.config)

    def _decode_latents(self, latents: Tensor) -> Tensor:
        """Undoes `_encode_pixels`; float32 in and out."""
        vae = self.pipeline.vae
        return vae_pixels(vae, denormalised(latents, vae.config))

    def _shift(self, sequence_length: int, num_inference_steps: int) -> float:
        """Returns the `mu` of schedulers that shift by the number of image tokens."""
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        config = self.pipeline.scheduler.config
        return calculate_shift(sequence_length, *(config[name] for name in names))

    @abstractmethod
    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Calls the denoiser, (n, C, h, w) in and out.

        Latents and conditions come in its dtype and timesteps in its unit. A denoiser that predicts x0 - n is negated.
        """

    def _check_present(self, names: Sequence[str], purpose: str) -> None:
        missing = [name for name in names if getattr(self.pipeline, name) is None]
        if missing:
            raise ValueError(
                f"{purpose} needs {', '.join(missing)}, but this {type(self.pipeline).__name__} has none; load the "
                "pipeline with it, or take from a cache what it would make"
            )

    def _check_call(self, latents: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> None:
        channels, multiple = self.latent_channels, self.latent_multiple
        if latents.ndim != 4 or latents.shape[1] != channels or any(side % multiple for side in latents.shape[2:]):
            raise ValueError(
                f"{type(self.denoiser).__name__} needs latents (n, {channels}, h, w) with h and w multiples of "
                f"{multiple}, but they are {tuple(latents.shape)}"
            )
        row = latents.shape[:1]  # (n,)
        uneven = {name: tuple(value.shape) for name, value in conditions.items() if value.shape[:1] != row}
        if timestep.shape != row:
            uneven["timestep"] = tuple(timestep.shape)
        if uneven:
            raise ValueError(
                f"{len(latents)} noisy latents need a timestep of shape {tuple(row)} and as many rows of every "
                f"condition, but got {uneven}; pick the rows with take(conditions, index)"
            )
