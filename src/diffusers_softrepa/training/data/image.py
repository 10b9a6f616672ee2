"""From an image of a data set to the pixels that the VAE reads: decoding, orientation, size and crop.

An image of size (h, w) is scaled by max(H / h, W / w) to fill (H, W), and the rest of its longer side is cropped,
in the centre or at a random place. With aspect buckets, (H, W) is the one of several sizes of about equal area whose
aspect ratio is nearest to that of the image: |log(H / W) - log(h / w)| is least.
"""

from __future__ import annotations

import hashlib
import io
import math
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, final

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

Size = tuple[int, int]

_MAX_ASPECT_RATIO = 2.0  # of the longest bucket
_ORIENTATION = 0x0112  # the EXIF tag
_QUARTER_TURNS = (5, 6, 7, 8)  # its values that swap the sides
_SIDES = (0x0100, 0x0101)  # the TIFF tags of the stored width and height
_LOADING = threading.Lock()


class BrokenExample(ValueError):
    """An example without a readable image or caption; it is skipped and counted."""


@final
@dataclass(frozen=True)
class Framing:
    """Sizes and crops of the images.

    Attributes:
        resolution: Side of the square images in pixels; with aspect buckets, of a square of their area. Defaults to
            512.
        aspect_buckets: Whether images keep their aspect ratio, in sizes of about equal area; defaults to False.
        multiple_of: The sides of buckets are multiples of this number, which is a multiple of the VAE's factor times
            the patch size; defaults to 64.
        random_crop: Whether images are cropped at a place that is drawn per image and epoch; defaults to False, in
            the centre.
        flip: Whether half of the images are mirrored, drawn per image and epoch; defaults to False, because it makes
            "left of" in a caption wrong.
        further_resolutions: Resolutions in which an epoch has every image besides `resolution`; defaults to none.

    Raises:
        ValueError: A resolution is smaller than `multiple_of`.
    """

    resolution: int = 512
    aspect_buckets: bool = False
    multiple_of: int = 64
    random_crop: bool = False
    flip: bool = False
    further_resolutions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for side in self.resolutions:
            if side < self.multiple_of:
                raise ValueError(
                    f"resolutions must be at least {self.multiple_of} pixels, the VAE's factor times the patch size, "
                    f"but got {side}; give a multiple of {self.multiple_of}"
                )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All resolutions in which an epoch has every image."""
        return (self.resolution, *self.further_resolutions)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes (H, W): those of `resolution` from wide to tall, then those of the further resolutions."""
        return tuple(dict.fromkeys(size for side in self.resolutions for size in self._sizes_at(side)))

    def sizes_of(self, original: Size) -> tuple[Size, ...]:
        """Returns the size (H, W) that an image of size (h, w) is resized to at each resolution."""
        aspect = math.log(original[0] / original[1])
        return tuple(
            min(self._sizes_at(side), key=lambda size: abs(math.log(size[0] / size[1]) - aspect))
            for side in self.resolutions
        )

    def settings(self, seed: int) -> dict[str, Any]:
        """Returns everything that an image's pixels of epoch 0 depend on, for the key of a latent cache."""
        given = {name: value for name, value in asdict(self).items() if name != "further_resolutions" or value}
        return {**given, "seed": seed if self.random_crop or self.flip else None}

    def _sizes_at(self, side: int) -> tuple[Size, ...]:
        return bucket_sizes(side, self.multiple_of) if self.aspect_buckets else ((side, side),)


@cache
def bucket_sizes(side: int, multiple_of: int) -> tuple[Size, ...]:
    """Returns sizes (H, W) of about the area of a square, from wide to tall.

    Short sides are the multiples up to the side of the square; a long side is the multiple that brings the area
    nearest, so the area differs by less than multiple_of / 2 times the short side.
    """
    shorts = range(multiple_of, side + 1, multiple_of)
    pairs = [(short, round(side**2 / short / multiple_of) * multiple_of) for short in shorts]
    square = round(side / multiple_of) * multiple_of
    pairs = [(short, long) for short, long in pairs if max(side**2 / short, long) <= _MAX_ASPECT_RATIO * short]
    sizes = {(square, square), *pairs, *((long, short) for short, long in pairs)}
    return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


def render(image: Image.Image, size: Size, *, crop_at: float = 0.5, flip: bool = False) -> Tensor:
    """Crops an upright RGB image and resizes it (Lanczos, antialiased).

    Args:
        image: The image.
        size: Size (H, W) of the pixels.
        crop_at: Place of the crop along the longer side, from 0 (left or top) to 1; defaults to 0.5, the centre.
        flip: Whether to mirror it; defaults to False.

    Returns:
        Pixels (3, H, W) float32 in [-1, 1].
    """
    fitted = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS, centering=(crop_at, crop_at))
    array = np.array(ImageOps.mirror(fitted) if flip else fitted, dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)) / 127.5 - 1)


def fetch(image: Any) -> bytes | Image.Image:
    """Reads an image of a data set without decoding it.

    Args:
        image: Encoded bytes; a path or URL; a dict with "bytes" or "path", as `datasets` stores images; a PIL image;
            a uint8 array (h, w) or (h, w, 3 or 4); a tensor (1, 3 or 4, h, w), uint8 or float in [0, 1];
            or the OSError that the data set raised.

    Raises:
        BrokenExample: There is nothing to read.
        TypeError: The image is none of these.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if image is None or (isinstance(image, bytes | str) and not image):
        raise BrokenExample("there is no image")
    if isinstance(image, OSError):
        raise BrokenExample(f"the data set cannot read it: {image}") from image
    if isinstance(image, str | PathLike):
        try:
            with fsspec.open(str(image), "rb") if "://" in str(image) else Path(image).open("rb") as file:
                return file.read()
        except OSError as error:
            raise BrokenExample(f"{image} cannot be read: {error}") from error
    if isinstance(image, Tensor | np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image | bytes):
        return image
    raise TypeError(
        "images must be bytes, paths, PIL images, arrays or tensors, or dicts with 'bytes' or 'path', but got "
        f"{type(image).__name__}; name the column that holds them with image_column=..."
    )


def content_id(fetched: bytes | Image.Image) -> int:
    """Returns a hash in [0, 2^63) that is the same for equal files, or equal PIL images.

    Raises:
        BrokenExample: It is a PIL image whose file is cut off or gone.
    """
    if isinstance(fetched, Image.Image):
        try:
            with _LOADING:  # two rows may share one PIL image, and loading it twice at once breaks it
                fetched.load()
            header = f"{fetched.mode} {fetched.size} {fetched.getpalette()} "
            fetched = header.encode() + fetched.tobytes()
        except Exception as error:
            raise BrokenExample(f"it cannot be decoded: {error}") from error
    return int.from_bytes(hashlib.blake2b(fetched, digest_size=8).digest(), "little") >> 1


def image_size(image: Any) -> Size:
    """Returns the size (h, w) of the upright image from its header alone; errors as in `decode`."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    is_local = isinstance(image, str | PathLike) and "://" not in str(image)
    source: Any = image if is_local else fetch(image)
    try:
        with ExitStack() as opened:
            if not isinstance(source, Image.Image):  # not the caller's to close
                source = opened.enter_context(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))
            if not (source.width and source.height):
                raise ValueError(f"its size is {source.height} x {source.width}")
            return source.size if _is_turned(source) else (source.height, source.width)
    except Exception as error:  # the decoders of some forty formats raise what they like
        raise BrokenExample(f"its header cannot be read: {error}") from error


def decode(fetched: bytes | Image.Image) -> Image.Image:
    """Decodes an image to upright 8-bit RGB, with transparency over white, and the first frame of an animation.

    Raises:
        BrokenExample: It is cut off, no image, of size zero, or holds floats without a range.
    """
    try:
        image = fetched if isinstance(fetched, Image.Image) else Image.open(io.BytesIO(fetched))
        if not (image.width and image.height):
            raise ValueError(f"its size is {image.height} x {image.width}")
        image.load()
        image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" and not image.has_transparency_data else _to_rgb(image)
    except Exception as error:
        raise BrokenExample(f"it cannot be decoded: {error}") from error


def _from_array(image: Tensor | np.ndarray) -> Image.Image:
    if isinstance(image, Tensor):
        if image.is_floating_point():
            if not (image.numel() and image.min() >= 0 and image.max() <= 1):
                raise BrokenExample("its floats must be in [0, 1]")
            image = (image * 255).round().to(torch.uint8)
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).detach().cpu().numpy()
    image = image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (2, 3, 4))
    if image.dtype != np.uint8 or not is_image or not image.size:
        raise BrokenExample(f"arrays must be uint8 and (h, w) or (h, w, 3 or 4) but it is {image.dtype} {image.shape}")
    return Image.fromarray(np.ascontiguousarray(image))


def _is_turned(image: Image.Image) -> bool:
    """Whether `exif_transpose` will swap the sides of the decoded image."""
    if isinstance(image, TiffImageFile):  # Pillow turns it itself: its size when it is opened, or when it is decoded
        stored = tuple(map(image.tag_v2.get, _SIDES))
        return image.tag_v2.get(_ORIENTATION) in _QUARTER_TURNS and image.size == stored
    if isinstance(image, PngImageFile) and not _has_text_behind_pixels(image):
        # As `image.getexif()`, which would decode the whole PNG in search of what does not come.
        return Image.Image.getexif(image).get(_ORIENTATION) in _QUARTER_TURNS
    return image.getexif().get(_ORIENTATION) in _QUARTER_TURNS


def _has_text_behind_pixels(image: PngImageFile) -> bool:
    """Whether chunks that may hold an orientation follow the pixels of a PNG, which is not decoded yet."""
    file, kinds = image.fp, []
    if file is None:  # decoded already: all of it is known
        return False
    position = file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8:
        kinds.append(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    file.seek(position)
    return not {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}.isdisjoint(kinds[kinds.index(b"IDAT") :])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("it holds floats, whose range is not known; store it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, in 32 where the format has no other; converting would clip
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
