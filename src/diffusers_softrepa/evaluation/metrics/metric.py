"""What a metric is: of single pictures (`ImageMetric`) or of all pictures of a setting at once (`SetMetric`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor

from ..prompts import Prompt

Scores = Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float]]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Metric(ABC):  # noqa: B024  (what is abstract differs between its two kinds)
    """One measure of pictures.

    Attributes:
        name: How tables call it.
        higher_is_better: Its direction.
        reference: Where it was published.
        batch_size: Pictures that it takes at once.
    """

    name: str = "metric"
    higher_is_better: bool = True
    reference: str = ""
    batch_size: int = 16

    def setup(self, device: torch.device) -> None:  # noqa: B027  (many have nothing to load)
        """Loads what it needs; called once before the first pictures.

        Raises:
            OSError: Weights cannot be had.
            ImportError: A package is not installed.
        """

    def check(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027  (most can score any prompt)
        """Raises if it cannot score pictures of these prompts; asked before anything is drawn.

        Args:
            prompts: All prompts of the evaluation.

        Raises:
            ValueError: A prompt lacks something that the metric compares with.
            OSError: A file that a prompt names is not there.
        """

    def close(self) -> None:  # noqa: B027
        """Lets go of what `setup` loaded."""


class ImageMetric(Metric):
    """A measure of each picture, given its prompt."""

    @abstractmethod
    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Returns a number for each picture, (n,); or several by name. NaN where it does not apply."""


class SetMetric(Metric):
    """A distance between the pictures of a setting and reference pictures, by the features of both.

    Args:
        references: The reference pictures: a folder, or a sequence of files or pictures.
    """

    higher_is_better = False

    def __init__(self, references: str | Path | Sequence[Any]) -> None:
        self.references = _listed(references)

    @abstractmethod
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns the features of pictures, (n, width) float32 on the CPU."""

    @abstractmethod
    def distance(self, features: Tensor, reference_features: Tensor) -> float:
        """Returns the distance of two sets of features, (n, width) and (m, width)."""

    def reference_features(self) -> Tensor:
        """Returns the features of the reference pictures, (m, width)."""
        batches = range(0, len(self.references), self.batch_size)
        return torch.cat(
            [self.features([opened(one) for one in self.references[at : at + self.batch_size]]) for at in batches]
        )


@final
class FunctionMetric(ImageMetric):
    """Any function of pictures and prompts as a metric.

    Args:
        function: Takes the pictures and their `Prompt`s; returns a number for each, or several by name.
        name: How tables call it; the function's name unless given.
        higher_is_better: Its direction.
        reference: Where it was published.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Image.Image], Sequence[Prompt]], Scores],
        name: str | None = None,
        *,
        higher_is_better: bool = True,
        reference: str = "",
    ) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.higher_is_better, self.reference = higher_is_better, reference

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        return self.function(images, prompts)


def named_scores(metric: ImageMetric, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Returns the scores of pictures by name, `metric` or `metric/part`, each (n,) float64 on the CPU.

    Raises:
        ValueError: The metric did not return a number for each picture.
    """
    with torch.no_grad():
        found = metric.score(images, prompts)
    parts = (
        {f"{metric.name}/{name}": value for name, value in found.items()}
        if isinstance(found, Mapping)
        else {metric.name: found}
    )
    scores = {name: torch.as_tensor(value).detach().to("cpu", torch.float64) for name, value in parts.items()}
    for name, value in scores.items():
        if value.shape != (len(images),):
            raise ValueError(
                f"{name} must be one number for each of {len(images)} pictures, but has shape {tuple(value.shape)}"
            )
    return scores


def opened(image: Image.Image | str | Path) -> Image.Image:
    """Returns a picture in RGB, read from a file if it is one."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with Image.open(image) as file:
        return file.convert("RGB")


def _listed(references: str | Path | Sequence[Any]) -> list[Any]:
    if isinstance(references, str | Path):
        folder = Path(references)
        if not folder.is_dir():
            raise OSError(f"reference pictures are in a folder, but there is no folder {folder}")
        references = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(references) < 2:
        raise ValueError(
            f"a distance between sets needs at least 2 reference pictures, but there are {len(references)}"
        )
    return list(references)
