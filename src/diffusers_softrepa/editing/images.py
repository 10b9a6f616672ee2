"""Conversion of given images to pixels of one size, and of latents to images."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..conditioning import Conditioner
from ..quoting import quoted
from .request import check_count

OutputType = Literal["pil", "pt", "np", "latent"]
Images = Image.Image | np.ndarray | Tensor | Sequence[Image.Image] | Sequence[np.ndarray] | Sequence[Tensor]


def read_images(conditioner: Conditioner, images: Any, height: int | None, width: int | None) -> Tensor:
    """Returns one or several images as pixels of one size.

    Args:
        conditioner: Conditioner of the pipeline.
        images: PIL images, rotated as their EXIF data say; arrays (H, W, 3) or (n, H, W, 3); or tensors (3, H, W) or
            (n, 3, H, W), with values in [0, 1]. One of those or a list.
        height: Height in pixels. None for that of the images, rounded down to a multiple that the denoiser takes.
        width: Width in pixels. None for that of the images, rounded down to a multiple that the denoiser takes.

    Returns:
        Pixels (n, 3, height, width) float32 in [-1, 1].

    Raises:
        TypeError: The images are of an unknown type or of several types.
        ValueError: There is no image, sizes differ, values are out of range, or the denoiser does not take the size.
    """
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_count(name, side)
    listed = list(images) if isinstance(images, list | tuple) else [images]
    if not listed:
        raise ValueError("there must be at least one image, but the list is empty")
    kinds = {kind for kind in (Image.Image, np.ndarray, Tensor) for image in listed if isinstance(image, kind)}
    if len(kinds) != 1 or not all(isinstance(image, tuple(kinds)) for image in listed):
        raise TypeError(
            "images must be PIL images, arrays or tensors, all of one type, but are "
            f"{sorted({type(image).__name__ for image in listed})}; diffusers.utils.load_image reads files and URLs"
        )
    pixels = [part for image in listed for part in _unbatched(image)]
    sizes = {tuple(part.shape[1:]) for part in pixels}
    if len(sizes) > 1 and (height is None or width is None):
        raise ValueError(f"images of one batch must have one size, but have {sorted(sizes)}; give height and width")
    multiple, size = conditioner.image_multiple, pixels[0].shape[1:]
    height, width = height or size[0] // multiple * multiple, width or size[1] // multiple * multiple
    conditioner.latent_shape(height, width)
    return torch.cat([_resized(conditioner, part, height, width) for part in pixels])


def to_output(conditioner: Conditioner, latents: Tensor, output_type: OutputType) -> Any:
    """Returns latents (n, C, h, w) as a list of PIL images, a tensor, an array, or unchanged."""
    if output_type == "latent":
        return latents
    pixels = conditioner.decode_latents(latents)
    return conditioner.pipeline.image_processor.postprocess(pixels, output_type=output_type)


def check_output_type(output_type: str) -> None:
    """Raises a ValueError if `to_output` does not know an output type."""
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type must be one of {get_args(OutputType)} but got {quoted(output_type)}")


def _unbatched(image: Any) -> list[Tensor]:
    """Returns an image, or the images of a batch, as tensors (3, H, W) float32 in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float32) / 255
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3) if image.ndim in (3, 4) else image
    stored = isinstance(image, Tensor) and image.layout == torch.strided and image.device.type != "meta"
    if not stored or image.ndim not in (3, 4) or image.shape[-3] != 3 or not image.is_floating_point():
        raise ValueError(
            "images must be dense floating-point arrays (n, H, W, 3) or tensors (n, 3, H, W) in [0, 1], but one is "
            f"{image.dtype} of shape {tuple(image.shape)}"
        )
    if not (image.numel() and image.min() >= 0 and image.max() <= 1):
        raise ValueError("the values of images must be in [0, 1]; convert those in [-1, 1] by (pixels + 1) / 2")
    return list(image.float().reshape(-1, *image.shape[-3:]))


def _resized(conditioner: Conditioner, pixels: Tensor, height: int, width: int) -> Tensor:
    """Resizes one image (3, H, W) in [0, 1] and returns it as (1, 3, height, width) in [-1, 1]."""
    processor = conditioner.pipeline.image_processor
    if pixels.shape[1:] == (height, width):
        return processor.normalize(pixels[None])
    image = processor.numpy_to_pil(pixels.movedim(0, -1)[None].cpu().numpy())
    return processor.preprocess(image, height, width)
