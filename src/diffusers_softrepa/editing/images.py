"""Images in, as pixels of one size, and latents out, as pictures."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..conditioning import Conditioner

OutputType = Literal["pil", "pt", "np", "latent"]
Images = Image.Image | np.ndarray | Tensor | Sequence[Image.Image] | Sequence[np.ndarray] | Sequence[Tensor]


def read_images(conditioner: Conditioner, images: Any, height: int | None, width: int | None) -> Tensor:
    """Reads one image or several.

    Args:
        conditioner: Of the pipeline.
        images: PIL images, turned upright; arrays (H, W, 3) or (n, H, W, 3); tensors (3, H, W) or (n, 3, H, W);
            numbers in [0, 1]; one of those or a list.
        height: In pixels; that of the images, rounded down to what the denoiser takes, unless given.
        width: Likewise.

    Returns:
        Pixels (n, 3, height, width) float32 in [-1, 1].

    Raises:
        TypeError: They are something else, or of several kinds.
        ValueError: There is none, sizes differ, numbers are out of range, or the denoiser does not take the size.
    """
    listed = list(images) if isinstance(images, list | tuple) else [images]
    if not listed:
        raise ValueError("there is no image to edit: the list is empty")
    kinds = {kind for kind in (Image.Image, np.ndarray, Tensor) for image in listed if isinstance(image, kind)}
    if len(kinds) != 1 or not all(isinstance(image, tuple(kinds)) for image in listed):
        raise TypeError(
            "images must be PIL images, arrays or tensors, all of one kind, but are "
            f"{sorted({type(image).__name__ for image in listed})}; diffusers.utils.load_image reads files and URLs"
        )
    pixels = [part for image in listed for part in _unbatched(image)]
    sizes = {tuple(part.shape[1:]) for part in pixels}
    if len(sizes) > 1 and (height is None or width is None):
        raise ValueError(f"images of one batch must be of one size, but are {sorted(sizes)}; give height and width")
    multiple, size = conditioner.image_multiple, pixels[0].shape[1:]
    height, width = height or size[0] // multiple * multiple, width or size[1] // multiple * multiple
    conditioner.latent_shape(height, width)
    return torch.cat([_resized(conditioner, part, height, width) for part in pixels])


def show(conditioner: Conditioner, latents: Tensor, output_type: OutputType) -> Any:
    """Returns latents (n, C, h, w) as pictures: a list of PIL images, a tensor, an array, or the latents."""
    if output_type == "latent":
        return latents
    pixels = conditioner.decode_latents(latents)
    return conditioner.pipeline.image_processor.postprocess(pixels, output_type=output_type)


def check_output_type(output_type: str) -> None:
    """Raises a ValueError for what `show` does not know."""
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type must be one of {get_args(OutputType)} but got {output_type!r}")


def _unbatched(image: Any) -> list[Tensor]:
    """Returns the images in one item of the list as tensors (3, H, W) float32 in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float32) / 255
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3) if image.ndim in (3, 4) else image
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or not image.is_floating_point():
        raise ValueError(
            "images must be floating numbers in [0, 1], arrays (n, H, W, 3) or tensors (n, 3, H, W), but one is "
            f"{image.dtype} of shape {tuple(image.shape)}"
        )
    if not (image.numel() and image.min() >= 0 and image.max() <= 1):
        raise ValueError("images must be of numbers in [0, 1]; (pixels + 1) / 2 brings [-1, 1] there")
    return list(image.float().reshape(-1, *image.shape[-3:]))


def _resized(conditioner: Conditioner, pixels: Tensor, height: int, width: int) -> Tensor:
    """Brings one image (3, H, W) in [0, 1] to a size, as (1, 3, height, width) in [-1, 1]."""
    processor = conditioner.pipeline.image_processor
    if pixels.shape[1:] == (height, width):
        return processor.normalize(pixels[None])
    picture = processor.numpy_to_pil(pixels.movedim(0, -1)[None].cpu().numpy())
    return processor.preprocess(picture, height, width)
