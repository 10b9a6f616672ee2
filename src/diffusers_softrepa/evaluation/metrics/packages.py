"""Metrics that are scored by their authors' own packages, where those are installed: `LPIPS`, `ImageReward`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..prompts import Prompt
from .loading import package
from .metric import ImageMetric, opened


@final
class LPIPS(ImageMetric):
    """Perceptual distance of each picture to the one that belongs to its prompt (`prompt.metadata["image"]`).

    The other picture is resized to the generated one's size.

    Args:
        net: The network, `"alex"` or `"vgg"`.
        side: Both pictures are resized to a square of this side, unless None.
    """

    name = "lpips"
    higher_is_better = False
    reference = "Zhang et al. 2018, arXiv 1801.03924"

    def __init__(self, net: Literal["alex", "vgg"] = "alex", *, side: int | None = None) -> None:
        self.net, self.side = net, side
        self._model: Any = None

    def setup(self, device: torch.device) -> None:
        self._model = package("lpips", "LPIPS").LPIPS(net=self.net, verbose=False).eval().to(device)
        self._device = device

    def close(self) -> None:
        self._model = None

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            image = _other_image(prompt)
            if isinstance(image, str | os.PathLike) and not Path(image).is_file():
                raise FileNotFoundError(
                    f"LPIPS compares with {image}, the image of prompt {prompt.id!r}; it is not there"
                )

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        return torch.stack([self._distance(image, prompt) for image, prompt in zip(images, prompts, strict=True)])

    def _distance(self, image: Image.Image, prompt: Prompt) -> Tensor:
        size = image.size if self.side is None else (self.side, self.side)
        pair = [_signed(one.resize(size, Image.Resampling.BICUBIC)) for one in (image, opened(_other_image(prompt)))]
        return self._model(*(one.to(self._device) for one in pair)).flatten()[0].float().cpu()


@final
class ImageReward(ImageMetric):
    """ImageReward, by its authors' package.

    Args:
        model: Name of the model, as that package knows it.
    """

    name = "image_reward"
    reference = "Xu et al. 2023, arXiv 2304.05977"

    def __init__(self, model: str = "ImageReward-v1.0") -> None:
        self.model = model
        self._loaded: Any = None

    def setup(self, device: torch.device) -> None:
        self._loaded = package("ImageReward", "ImageReward").load(self.model, device=str(device))

    def close(self) -> None:
        self._loaded = None

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        pairs = zip(images, prompts, strict=True)
        return torch.tensor([float(self._loaded.score(prompt.text, image)) for image, prompt in pairs])


def _other_image(prompt: Prompt) -> Any:
    if "image" not in prompt.metadata:
        raise ValueError(
            f"LPIPS compares with a picture of each prompt, but prompt {prompt.id!r} has no metadata 'image'; "
            "for COCO give load_prompts the folder of its images"
        )
    return prompt.metadata["image"]


def _signed(image: Image.Image) -> Tensor:
    """Returns a picture in -1..1, (1, 3, height, width)."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
