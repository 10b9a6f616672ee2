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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, Literal, final, get_args

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

Size = tuple[int, int]
Crop = Literal["center", "random"]

_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 are turned by a quarter
_SIDES = (0x0100, 0x0101)  # the TIFF tags of the stored width and height
_LOADING = threading.Lock()


class BrokenExample(ValueError):
    """An example without a readable image or caption; it is skipped and counted."""


@final
@dataclass(frozen=True)
class Framing:
    """Sizes and crops of the images.

    Attributes:
        resolution: Height and width in pixels, or one number for both; with aspect buckets, of a square of their
            area. Defaults to 512.
        aspect_buckets: Whether images keep their aspect ratio, in sizes of about equal area; defaults to False.
        multiple_of: The sides of buckets are multiples of this number, which is a multiple of the VAE's factor times
            the patch size; defaults to 64.
        max_aspect_ratio: Aspect ratio of the longest bucket; defaults to 2.
        crop: "center" (default) or "random", drawn per image and epoch.
        flip: Whether half of the images are mirrored, drawn per image and epoch; defaults to False, because it makes
            "left of" in a caption wrong.
        further_resolutions: Resolutions in which an epoch has every image besides `resolution`.

    Raises:
        ValueError: A field is out of range.
    """

    resolution: int | Size = 512
    aspect_buckets: bool = False
    multiple_of: int = 64
    max_aspect_ratio: float = 2.0
    crop: Crop = "center"
    flip: bool = False
    further_resolutions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "further_resolutions", tuple(self.further_resolutions))
        for further in self.further_resolutions:
            replace(self, resolution=further, further_resolutions=())
        given = (self.resolution,) * 2 if isinstance(self.resolution, int) else tuple(self.resolution)
        if len(given) != 2 or not all(isinstance(side, int) and side > 0 for side in given):
            raise ValueError(
                f"resolution must be a positive number or (height, width) of pixels but got {self.resolution!r}"
            )
        object.__setattr__(self, "resolution", given)
        if not 1 <= self.multiple_of <= min(given):
            raise ValueError(
                f"multiple_of must be between 1 and the resolution {given} but got {self.multiple_of}; "
                "give the VAE's factor times the patch size, such as 16 for SD3"
            )
        if not self.max_aspect_ratio >= 1:
            raise ValueError(f"max_aspect_ratio must be at least 1 but got {self.max_aspect_ratio}")
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop must be one of {get_args(Crop)} but got {self.crop!r}")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes (H, W): those of `resolution` from wide to tall, then those of the further resolutions."""
        return tuple(dict.fromkeys(size for sizes in self._sizes for size in sizes))

    def size_of(self, original: Size) -> Size:
        """Returns the size (H, W) that an image of size (h, w) is resized to at `resolution`."""
        return self.sizes_of(original)[0]

    def sizes_of(self, original: Size) -> tuple[Size, ...]:
        """Returns the size (H, W) that an image of size (h, w) is resized to at each resolution."""
        aspect = math.log(original[0] / original[1])
        return tuple(min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect)) for sizes in self._sizes)

    @property
    def _sizes(self) -> list[tuple[Size, ...]]:
        first: Any = self.resolution  # a pair since __post_init__
        pairs = [first, *((side, side) for side in self.further_resolutions)]
        if not self.aspect_buckets:
            return [(pair,) for pair in pairs]
        return [bucket_sizes(height * width, self.multiple_of, self.max_aspect_ratio) for height, width in pairs]

    def settings(self, seed: int) -> dict[str, Any]:
        """Returns everything that an image's pixels of epoch 0 depend on, for the key of a latent cache."""
        drawn = self.crop == "random" or self.flip
        given = {name: value for name, value in asdict(self).items() if name != "further_resolutions" or value}
        return {**given, "seed": seed if drawn else None}


@cache
def bucket_sizes(area: int, multiple_of: int, max_aspect_ratio: float) -> tuple[Size, ...]:
    """Returns sizes (H, W) of about one area, from wide to tall.

    Short sides are the multiples up to the square root of the area; a long side is the multiple that brings the area
    nearest, so the area differs by less than multiple_of / 2 times the short side.
    """
    shortest = math.sqrt(area / max_aspect_ratio)
    shorts = [k * multiple_of for k in range(1, int(math.sqrt(area)) // multiple_of + 1)]
    pairs = [(short, round(area / short / multiple_of) * multiple_of) for short in shorts if short >= shortest]
    pairs = [(short, long) for short, long in pairs if long <= max_aspect_ratio * short]
    side = max(1, round(math.sqrt(area) / multiple_of)) * multiple_of
    sizes = {(side, side), *pairs, *((long, short) for short, long in pairs)}
    return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


@final
@dataclass(frozen=True)
class Frame:
    """The crop of one image.

    Attributes:
        size: Size (H, W) of the pixels.
        box: Part of the upright image that is kept, (left, top, right, bottom) in its pixels.
        flip: Whether it is mirrored.
    """

    size: Size
    box: tuple[float, float, float, float]
    flip: bool


def place_frame(original: Size, size: Size, framing: Framing, *, crop_at: float = 0.5, flip_at: float = 1.0) -> Frame:
    """Returns the crop of an image.

    Args:
        original: Size (h, w) of the upright image.
        size: Size (H, W) of the pixels.
        framing: The settings.
        crop_at: Draw in [0, 1) that places a random crop.
        flip_at: Draw in [0, 1); below 0.5 the image is mirrored, if the framing flips.
    """
    scale = max(size[0] / original[0], size[1] / original[1])
    at = crop_at if framing.crop == "random" else 0.5
    top, left = (at * max(0.0, whole - part / scale) for whole, part in zip(original, size, strict=True))
    box = (left, top, min(left + size[1] / scale, original[1]), min(top + size[0] / scale, original[0]))
    return Frame(size, box, framing.flip and flip_at < 0.5)


def render(image: Image.Image, frame: Frame) -> Tensor:
    """Resizes (Lanczos, antialiased) and crops an upright RGB image to (3, H, W) float32 in [-1, 1]."""
    height, width = frame.size
    resized = image.resize((width, height), Image.Resampling.LANCZOS, box=frame.box)
    array = np.array(resized, dtype=np.float32)  # (H, W, 3)
    array = array[:, ::-1] if frame.flip else array
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
    if isinstance(image, OSError):
        raise BrokenExample(f"the data set cannot read it: {image}") from image
    if image is None or (isinstance(image, bytes | str) and not image):
        raise BrokenExample("there is no image")
    if isinstance(image, str | PathLike):
        return _read(image)
    if isinstance(image, Tensor | np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image | bytes):
        return image
    raise TypeError(
        "images must be bytes, paths, PIL images, arrays or tensors, or dicts with 'bytes' or 'path', but got "
        f"{type(image).__name__}; name the column that holds them with image_column=..."
    )


def content_id(fetched: bytes | Image.Image) -> int:
    """Returns a hash in [0, 2^63) that is the same for equal files, or equal PIL images."""
    if isinstance(fetched, Image.Image):
        header = f"{fetched.mode} {fetched.size} {fetched.getpalette()} "
        fetched = header.encode() + _loaded(fetched).tobytes()
    return int.from_bytes(hashlib.blake2b(fetched, digest_size=8).digest(), "little") >> 1


def image_size(image: Any) -> Size:
    """Returns the size (h, w) of the upright image from its header alone; errors as in `decode`."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    local = isinstance(image, str | PathLike) and "://" not in str(image)
    source = image if local else fetch(image)
    try:
        with _open(source) as opened:
            return _checked_size(opened)
    except BrokenExample:
        raise
    except Exception as error:  # the decoders of some forty formats raise what they like
        raise BrokenExample(f"its header cannot be read: {error}") from error


def decode(fetched: bytes | Image.Image) -> Image.Image:
    """Decodes an image to upright 8-bit RGB, with transparency over white, and the first frame of an animation.

    Raises:
        BrokenExample: It is cut off, no image, of size zero, or holds floats without a range.
    """
    try:
        with _open(fetched) as opened:
            if not (opened.width and opened.height):
                raise BrokenExample(f"its size is {opened.height} x {opened.width}")
            opened.load() if isinstance(fetched, bytes) else _loaded(opened)
            upright = ImageOps.exif_transpose(opened)
            return upright if upright.mode == "RGB" and not upright.has_transparency_data else _to_rgb(upright)
    except BrokenExample:
        raise
    except Exception as error:
        raise BrokenExample(f"it cannot be decoded: {error}") from error


def _read(path: str | PathLike[str]) -> bytes:
    try:
        if "://" in str(path):
            with fsspec.open(str(path), "rb") as file:
                return file.read()
        return Path(path).read_bytes()
    except OSError as error:
        raise BrokenExample(f"{path} cannot be read: {error}") from error


def _from_array(image: Tensor | np.ndarray) -> Image.Image:
    if isinstance(image, Tensor):
        if image.is_floating_point():
            if not (image.numel() and image.min() >= 0 and image.max() <= 1):
                raise BrokenExample("its floats must be in [0, 1]")
            image = (image * 255).round().to(torch.uint8)
        image = image.detach().cpu().permute(1, 2, 0).numpy() if image.ndim == 3 else image.detach().cpu().numpy()
    image = image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
        raise BrokenExample(f"arrays must be uint8 and (h, w) or (h, w, 3 or 4) but it is {image.dtype} {image.shape}")
    return Image.fromarray(np.ascontiguousarray(image))


def _open(source: Any) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)  # not ours to close
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _loaded(image: Image.Image) -> Image.Image:
    with _LOADING:  # two rows may share one PIL image, and loading it twice at once breaks it
        image.load()
    return image


def _checked_size(image: Image.Image) -> Size:
    width, height = image.size
    if not (width and height):
        raise BrokenExample(f"its size is {height} x {width}")
    return (width, height) if _is_turned(image) else (height, width)


def _is_turned(image: Image.Image) -> bool:
    """Whether `exif_transpose` will swap the sides of the decoded image."""
    if isinstance(image, TiffImageFile):  # Pillow turns it itself: its size when it is opened, or when it is decoded
        return image.tag_v2.get(_ORIENTATION) in (5, 6, 7, 8) and image.size == tuple(map(image.tag_v2.get, _SIDES))
    if isinstance(image, PngImageFile) and not _has_text_behind_pixels(image):
        # As `image.getexif()`, which would decode the whole PNG in search of what does not come.
        return Image.Image.getexif(image).get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)


def _has_text_behind_pixels(image: PngImageFile) -> bool:
    """Whether chunks that may hold an orientation follow the pixels of a PNG, which is not decoded yet."""
    file, behind = image.fp, False
    if file is None:  # decoded already: all of it is known
        return False
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            behind |= head[4:] == b"IDAT"
            if behind and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
        return False
    finally:
        file.seek(position)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenExample("it holds floats, whose range is not known; store it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, in 32 where the format has no other; converting would clip
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
