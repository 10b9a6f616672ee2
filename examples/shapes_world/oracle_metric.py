"""The oracle as a metric of the package's own `evaluate` and `score`: an example of a metric that a user writes."""

from collections.abc import Sequence
from typing import final

from PIL import Image

from diffusers_softrepa.evaluation import ImageMetric, Prompt
from shapes_world.oracle import judge
from shapes_world.world import Ask


def as_prompts(asks: Sequence[Ask]) -> list[Prompt]:
    """Returns asks as prompts: their captions, by skill, each with what it says in its metadata."""
    return [Prompt(f"{number:05d}", ask.caption, ask.skill, {"ask": ask}) for number, ask in enumerate(asks)]


@final
class OracleMetric(ImageMetric):
    """1 where the oracle finds exactly what the prompt says, else 0. The prompts are those of `as_prompts`."""

    name = "oracle"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        pairs = zip(images, prompts, strict=True)
        return [float(judge(image, prompt.metadata["ask"]).correct) for image, prompt in pairs]
