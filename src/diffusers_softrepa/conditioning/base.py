"""The base class of all conditioners: from images and captions to the prediction of the denoiser.

With the encoder E of the VAE, images x, captions c, noise n and timestep t in 0..1000:

    x0 = (E(x) - shift) * scale                `encode_images`
    conditions = text encoders of c            `encode_captions`
    prediction = denoiser(x_t, t, conditions)  `predict`, with x_t = noising.noisy_latents(x0, n, t)

The prediction is compared to `noising.target(x0, n, t)`. Conditioners hide the layout, timestep scale and sign of each
denoiser: latents are (n, C, h, w), timesteps run from 0 (clean) to 1000 (noise), and flow matching predicts n - x0.
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
    """Calls the components of a text-to-image pipeline as sampling does, for batches of captions and images.

    Components are read from the pipeline in every call, so they may be moved or offloaded, or set to None once their
    outputs are cached. There is one subclass per pipeline class. It sets the class variables, implements the abstract
    members, and takes its settings as keyword arguments with the published values as defaults.

    Attributes:
        family: Name of the `FamilySpec` of the denoiser.
        pipelines: Names of the supported pipeline classes. Their subclasses are supported as well.
        text_components: Names of the pipeline components that `encode_captions` needs, including `text_encoder`.
        checkpoints_exactly: Whether gradient checkpointing leaves predictions unchanged. Defaults to True.
        sigmas_from_one: Whether the pipeline samples at noise levels 1, 1 - 1/n, ..., 1/n before shifting, instead of
            those of its scheduler. Defaults to False.
        pipeline: The pipeline.
        noising: How the scheduler adds noise to latents, and what the denoiser predicts.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    text_components: ClassVar[tuple[str, ...]]
    checkpoints_exactly: ClassVar[bool] = True
    sigmas_from_one: ClassVar[bool] = False

    def __init__(self, pipeline: Any) -> None:
        """Reads the noising from the scheduler of the pipeline.

        Args:
            pipeline: A text-to-image pipeline.

        Raises:
            ValueError: The scheduler is missing or unsuitable for training, or the denoiser reads more than noisy
                latents.
        """
        self.pipeline = pipeline
        self._check_present(["scheduler"], "calling the denoiser")
        self.noising = Noising.from_scheduler(pipeline.scheduler)
        made = self.latent_channels if pipeline.vae is None else self._vae_channels
        if made != self.latent_channels:
            raise ValueError(
                f"the denoiser must read latents of the VAE and nothing else, but {type(self.denoiser).__name__} "
                f"reads {self.latent_channels} latent channels and the VAE makes {made}; train the text-to-image "
                "model, not its inpainting or control variant"
            )

    @property
    def denoiser(self) -> nn.Module:
        """The frozen model to which soft tokens are added, without the wrapper of `torch.compile`."""
        return denoiser_of(self.pipeline)

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Number C of latent channels."""

    @property
    @abstractmethod
    def latent_multiple(self) -> int:
        """Number of which height and width of latents must be multiples."""

    @property
    def _vae_channels(self) -> int:
        """Number of channels of the latents that the VAE returns."""
        return self.pipeline.vae.config.latent_channels

    @property
    def image_multiple(self) -> int:
        """Number of which height and width of images must be multiples, in pixels."""
        return self.pipeline.vae_scale_factor * self.latent_multiple

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Returns the shape (C, h, w) of the latents of an image.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.

        Raises:
            ValueError: Height or width is not a positive multiple of `image_multiple`.
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
        """Encodes captions as sampling encodes prompts, without negative prompts.

        Args:
            captions: At least one caption.

        Returns:
            One row per caption, on the device and in the dtype of the text encoder. All rows are padded to the same
            length, so rows of different calls and processes can be concatenated.

        Raises:
            TypeError: `captions` is not a sequence of strings.
            ValueError: `captions` is empty, or the pipeline has no text encoder or tokenizer.
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
            prompts: At least one negative prompt. Defaults to the one that sampling uses by default.

        Returns:
            One row per prompt, which can be concatenated with rows of `encode_captions`.

        Raises:
            TypeError: `prompts` is not a sequence of strings.
            ValueError: `prompts` is empty, or the pipeline has no text encoder or tokenizer.
        """
        return self.encode_captions([""] if prompts is None else prompts)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encodes images to normalised latents, on which the denoiser was trained.

        Args:
            pixels: (n, 3, H, W) floating in [-1, 1]; H and W are multiples of `image_multiple`.
            generator: Random generator for a sample of the posterior of the VAE. Defaults to None: the mode of the
                posterior, which is the same in every call.

        Returns:
            Latents x0, (n, C, h, w) float32 on the device of the VAE.

        Raises:
            ValueError: Shape or dtype of the pixels is wrong, or the pipeline has no VAE.
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
        """Decodes normalised latents, such as `encode_images` returns, as sampling does.

        Args:
            latents: (n, C, h, w) floating, on any device.

        Returns:
            Pixels, (n, 3, H, W) float32 on the device of the VAE, in [-1, 1] or slightly outside.

        Raises:
            ValueError: The pipeline has no VAE.
        """
        self._check_present(["vae"], "decoding latents")
        return self._decode_latents(latents.to(get_module_execution_device(self.pipeline.vae), torch.float32))

    def schedule(self, num_inference_steps: int, height: int, width: int) -> dict[str, Any]:
        """Returns the arguments that the pipeline passes to `set_timesteps` of its scheduler.

        Args:
            num_inference_steps: Number of sampling steps.
            height: Height of the images in pixels. Some schedulers shift the noise levels more for larger images.
            width: Width of the images in pixels.
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
        """Returns the prediction of the denoiser for rows with their own timesteps and captions.

        The result is differentiable with respect to the soft tokens.

        Args:
            noisy_latents: (n, C, h, w) floating, on the device on which the denoiser runs.
            timestep: (n,) in 0..1000, on any device.
            conditions: n rows of the result of `encode_captions`, on any device.

        Returns:
            The prediction of `noising.target`, (n, C, h, w) float32.

        Raises:
            ValueError: The shapes do not fit the denoiser or each other, or gradient checkpointing is on for a
                denoiser whose predictions it changes.
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
        """Returns the arguments of the pipeline's call that set guidance and keep images at the requested size.

        Args:
            guidance_scale: Guidance scale. Defaults to that of the pipeline.
        """
        return {} if guidance_scale is None else {"guidance_scale": guidance_scale}

    def check_checkpointing(self) -> None:
        """Checks that gradient checkpointing does not change the predictions of the denoiser.

        Raises:
            ValueError: It changes them.
        """
        if not self.checkpoints_exactly:
            name = type(self.denoiser).__name__
            raise ValueError(
                f"gradient checkpointing must not change predictions, but with it some blocks of {name} do not get "
                "the text mask that they get in sampling; train without gradient_checkpointing, with a smaller "
                "pair_chunk_size if memory runs out"
            )

    @abstractmethod
    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        """Encodes captions on `device`; `encode_captions` has checked them."""

    def _encode_pixels(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Encodes checked pixels to normalised latents; overridden for VAEs that need more than shift and scale."""
        vae = self.pipeline.vae
        return normalised(vae_latents(vae, pixels, generator), vae.config)

    def _decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes normalised float32 latents to float32 pixels; the inverse of `_encode_pixels`."""
        vae = self.pipeline.vae
        return vae_pixels(vae, denormalised(latents, vae.config))

    def _shift(self, sequence_length: int, num_inference_steps: int) -> float:
        """Returns the argument `mu` of schedulers that shift noise levels by the number of image tokens."""
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        config = self.pipeline.scheduler.config
        return calculate_shift(sequence_length, *(config[name] for name in names))

    @abstractmethod
    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Calls the denoiser and returns its prediction, (n, C, h, w).

        Args:
            latents: (n, C, h, w) in the dtype of the denoiser.
            timestep: (n,) on the timestep scale of the denoiser.
            conditions: n rows of conditions in the dtype of the denoiser.

        Returns:
            The prediction of `noising.target`. Subclasses negate the output of denoisers that predict x0 - n.
        """

    def _check_present(self, names: Sequence[str], purpose: str) -> None:
        missing = [name for name in names if getattr(self.pipeline, name) is None]
        if missing:
            raise ValueError(
                f"{purpose} needs {', '.join(missing)}, but this {type(self.pipeline).__name__} has none; load the "
                "pipeline with it, or use cached outputs"
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
