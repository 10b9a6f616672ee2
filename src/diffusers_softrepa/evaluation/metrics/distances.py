"""Distances between sets of images, computed from their features: Frechet distances (FD) and CMMD.

FD    |m - n|^2 + tr(C + D - 2 (C^1/2 D C^1/2)^1/2)     means m, n and covariances C, D of the features
CMMD  1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma 10,
      of normalized CLIP features; the means are over all pairs, including those of an image with itself
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, CLIPModel

from .clip import CLIP_B, ClipEncoder
from .loading import load
from .metric import SetMetric

DINOV2 = "facebook/dinov2-large"
CLIP_L_336 = "openai/clip-vit-large-patch14-336"
_CHUNK = 1024


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Returns the Frechet distance between the Gaussians that fit two sets of features, (n, width) and (m, width).

    Raises:
        ValueError: A set of features has fewer than two rows.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images on each side, not {len(one)} and {len(other)}")
    one, other = one.double(), other.double()
    covariance, other_covariance = one.T.cov(), other.T.cov()
    root = _root(covariance)
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    traces = covariance.trace() + other_covariance.trace()
    distance = (one.mean(0) - other.mean(0)).square().sum() + traces - 2 * cross
    return max(distance.item(), 0.0)  # rounding may make the distance of equal sets negative


def _root(matrix: Tensor) -> Tensor:
    """Returns the square root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def maximum_mean_discrepancy(one: Tensor, other: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Returns the squared maximum mean discrepancy of features, (n, width) and (m, width), under a Gaussian kernel."""
    one, other = one.double(), other.double()

    def mean_kernel(left: Tensor, right: Tensor) -> Tensor:
        rows = [torch.exp(-torch.cdist(part, right).square() / (2 * sigma**2)).sum() for part in left.split(_CHUNK)]
        return torch.stack(rows).sum() / (len(left) * len(right))

    return (scale * (mean_kernel(one, one) + mean_kernel(other, other) - 2 * mean_kernel(one, other))).item()


class _ClipDistance(SetMetric[ClipEncoder]):
    """A distance between CLIP features."""

    square: bool

    def __init__(self, references: str | Path | Sequence[Any], model: str) -> None:
        super().__init__(references)
        self.model = model

    def setup(self, device: torch.device) -> None:
        model = load(CLIPModel, self.model, self.name).eval().to(device)
        self.loaded = ClipEncoder(model, self.model, self.name, square=self.square)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        return self._finished(self.loaded.images(images).float()).cpu()

    @abstractmethod
    def _finished(self, features: Tensor) -> Tensor: ...


@final
class FDCLIP(_ClipDistance):
    """Frechet distance of CLIP image features.

    Args:
        references: The reference images: a folder, or a sequence of files or images.
        model: Hub id or folder of the CLIP model. Defaults to ViT-B/32.
    """

    name = "fd_clip"
    reference = "Kynkäänniemi et al. 2023, arXiv 2203.06026"
    square = False

    def __init__(self, references: str | Path | Sequence[Any], model: str = CLIP_B) -> None:
        super().__init__(references, model)

    def _finished(self, features: Tensor) -> Tensor:
        return features

    def distance(self, features: Tensor, reference_features: Tensor) -> float:
        return frechet_distance(features, reference_features)


@final
class CMMD(_ClipDistance):
    """CLIP maximum mean discrepancy, which assumes no Gaussian and is usable with hundreds of images.

    Args:
        references: The reference images: a folder, or a sequence of files or images.
        model: Hub id or folder of the CLIP model, to whose square images are resized. Defaults to ViT-L/14 at 336 px.
    """

    name = "cmmd"
    reference = "Jayasumana et al. 2024, arXiv 2401.09603"
    square = True

    def __init__(self, references: str | Path | Sequence[Any], model: str = CLIP_L_336) -> None:
        super().__init__(references, model)

    def _finished(self, features: Tensor) -> Tensor:
        return normalize(features, dim=-1)

    def distance(self, features: Tensor, reference_features: Tensor) -> float:
        return maximum_mean_discrepancy(features, reference_features)


@final
class FDDINOv2(SetMetric[tuple[Any, Any]]):
    """Frechet distance of the class tokens of DINOv2.

    Args:
        references: The reference images: a folder, or a sequence of files or images.
        model: Hub id or folder of the DINOv2 model. Defaults to ViT-L/14.
        side: Side in pixels of the square that images are resized to. Defaults to 224.
    """

    name = "fd_dinov2"
    reference = "Stein et al. 2023, arXiv 2306.04675"

    def __init__(self, references: str | Path | Sequence[Any], model: str = DINOV2, *, side: int = 224) -> None:
        super().__init__(references)
        self.model, self.side = model, side

    def setup(self, device: torch.device) -> None:
        size = {"size": {"height": self.side, "width": self.side}, "do_center_crop": False}
        processor = load(AutoImageProcessor, self.model, "FD-DINOv2", **size)
        self.loaded = processor, load(AutoModel, self.model, "FD-DINOv2").eval().to(device)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        processor, model = self.loaded
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels.to(model.device, model.dtype)).pooler_output.float().cpu()

    def distance(self, features: Tensor, reference_features: Tensor) -> float:
        return frechet_distance(features, reference_features)
