"""The base classes of metrics: `ImageMetric` scores each image, `SetMetric` all images of a setting together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor

from ...quoting import quoted
from ..prompts import Prompt
from .loading import HasModel, Loaded

Scores = Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float]]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Metric(HasModel[Loaded], ABC):
    """A measure of images.

    Attributes:
        name: Name in tables.
        higher_is_better: Whether higher scores are better.
        reference: Publication of the metric.
        batch_size: Number of images that are passed to it at once.
    """

    name: str = "metric"
    higher_is_better: bool = True
    reference: str = ""
    batch_size: int = 16

    def setup(self, device: torch.device) -> None:
        """Loads the model and assigns it to `loaded`; called before images are scored.

        Args:
            device: Device that the metric runs on.

        Raises:
            OSError: The weights cannot be found or downloaded.
            ImportError: A package is not installed.
        """

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Checks that images of these prompts can be scored; called before anything is drawn.

        Args:
            prompts: All prompts of the evaluation.

        Raises:
            ValueError: A prompt lacks something that the metric compares with.
            OSError: A file that a prompt names does not exist.
        """


class ImageMetric(Metric[Loaded]):
    """A measure of each image and its prompt."""

    @abstractmethod
    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Returns a score for each image, or several scores by name.

        Args:
            images: n images in RGB.
            prompts: The prompt of each image.

        Returns:
            Numbers (n,), or a mapping of names to numbers (n,); NaN where a score does not apply.
        """


class SetMetric(Metric[Loaded]):
    """A distance between the images of a setting and reference images, computed from features of both.

    Args:
        references: The reference images: a folder, or a sequence of files or images.
    """

    higher_is_better = False

    def __init__(self, references: str | Path | Sequence[Any]) -> None:
        self.references = _listed(references)

    @abstractmethod
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns the features of images, (n, width) float32 on the CPU."""

    @abstractmethod
    def distance(self, features: Tensor, reference_features: Tensor) -> float:
        """Returns the distance between two sets of features, (n, width) and (m, width)."""

    def reference_features(self) -> Tensor:
        """Returns the features of the reference images, (m, width) float32 on the CPU."""
        batches = range(0, len(self.references), self.batch_size)
        return torch.cat(
            [self.features([opened(one) for one in self.references[at : at + self.batch_size]]) for at in batches]
        )


@final
class FunctionMetric(ImageMetric[None]):
    """A metric made of a function of images and prompts.

    Args:
        function: Function that takes a list of images and the list of their `Prompt`s, and returns a number for each
            image, or several numbers by name.
        name: Name in tables. Defaults to the name of the function.
        higher_is_better: Whether higher scores are better. Defaults to True.
        reference: Publication of the metric. Defaults to none.
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
    """Returns the scores of images by name, `metric` or `metric/part`, each (n,) float64 on the CPU.

    Args:
        metric: The metric, after its `setup`.
        images: n images in RGB.
        prompts: The prompt of each image.

    Raises:
        ValueError: The metric did not return one number for each image.
    """
    with torch.no_grad():
        found = metric.score(images, prompts)
    parts = (
        {f"{metric.name}/{name}": value for name, value in found.items()}
        if isinstance(found, Mapping)
        else {metric.name: found}
    )
    scores = {}
    for name, value in parts.items():
        try:
            numbers = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{name} must be one number for each of {len(images)} images, but is {quoted(value)}"
            ) from error
        if numbers.is_complex() or numbers.shape != (len(images),):
            raise ValueError(
                f"{name} must be one number for each of {len(images)} images, but is {numbers.dtype} of shape "
                f"{tuple(numbers.shape)}"
            )
        scores[name] = numbers.detach().to("cpu", torch.float64)
    return scores


def check_image(image: Any) -> None:
    """Checks that `opened` can open an image, without decoding it; raises as `opened`."""
    if isinstance(image, Image.Image):
        return
    if not isinstance(image, str | Path):
        raise TypeError(f"an image must be a PIL image or a path, but is {quoted(image)}")
    Image.open(image).close()


def opened(image: Image.Image | str | Path) -> Image.Image:
    """Returns an image in RGB; a path is opened.

    Raises:
        TypeError: It is neither an image nor a path.
        OSError: The file does not exist or is no image.
    """
    check_image(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with Image.open(image) as file:
        return file.convert("RGB")


def _listed(references: str | Path | Sequence[Any]) -> list[Any]:
    if isinstance(references, str | Path):
        folder = Path(references)
        if not folder.is_dir():
            raise OSError(f"reference images must be in a folder, but there is no folder {folder}")
        references = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(references) < 2:
        raise ValueError(f"a distance between sets needs at least 2 reference images, but there are {len(references)}")
    return list(references)
