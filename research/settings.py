"""Settings in which contrast might be worth its price: three objectives each, on the same base.

    python research/settings.py --training-seeds 1 --guidance 1 2    # the options are those of study.py

A setting changes what adapters learn from, or for how long:

    domain     images as another camera takes them, darker and of a warm cast that the base never saw
    few-N      N images
    noisy-P    P per cent of the captions are false in one thing
    steps-N    N steps
    own-times  the published recipe with a noise level and noise of its own for each row instead of shared ones
"""

from typing import Any

import numpy as np
from PIL import Image

from shapes_world.train_adapter import BATCH, IMAGES, RECIPE, pairs
from shapes_world.world import Ask, Thing, random_ask, random_background, render
from study import DENOISING, METHODS, PUBLISHED, Method, Rows, all_images, main

CAST = np.array([0.85, 0.72, 0.52])  # of the other camera: what is left of red, green and blue


def as_another_camera(image: Image.Image) -> Image.Image:
    """Returns an image darker and with a warm cast."""
    return Image.fromarray((np.asarray(image) * CAST).round().astype(np.uint8))


def of_another_domain(seed: int, hard: int) -> list[dict[str, Any]]:
    """Returns the usual images as another camera takes them."""
    return [{**row, "image": as_another_camera(row["image"])} for row in all_images(seed, hard)]


def few(count: int) -> Rows:
    """Returns a source of so many images."""
    return lambda seed, hard: pairs(count, seed + 10, hard)


def noisy(share: float) -> Rows:
    """Returns a source of images of which so many have a caption that is false in one thing.

    Written negatives differ from the caption that is there in one thing and may be true by chance, as those that
    somebody writes without looking at the image.
    """

    def rows(seed: int, hard: int) -> list[dict[str, Any]]:
        rng = np.random.default_rng(seed + 10)
        found = []
        for _ in range(IMAGES):
            said, things = noisy_scene(rng, share)
            others = [other for kind in said.negatives().values() for other in kind]
            chosen = [others[i].rephrased(rng).caption for i in rng.permutation(len(others))[:hard]]
            image = render(things, random_background(rng))
            found.append({"image": image, "text": said.caption, "negatives": chosen})
        return found

    return rows


def noisy_scene(rng: np.random.Generator, share: float) -> tuple[Ask, list[Thing]]:
    """Draws things and what is said of them, which is false in one thing with the probability `share`."""
    ask = random_ask(rng)
    things = ask.scene(rng)
    false = ask.false_of(things, rng) if rng.random() < share else None
    return (ask if false is None else false.rephrased(rng)), things


RECIPES: dict[str, dict[str, Any]] = {"softrepa": PUBLISHED, "ours": RECIPE, "denoising": DENOISING}
FEW = (20, 100, 500)
SETTINGS: dict[str, Method] = {}
for _name, _recipe in RECIPES.items():
    _steps = METHODS[_name].steps
    SETTINGS[f"{_name}, domain"] = Method(_recipe, _steps, of_another_domain)
    for _count in FEW:  # a batch is never larger than what there is
        _size = min(_count, _recipe.get("train_batch_size", BATCH))
        SETTINGS[f"{_name}, few-{_count}"] = Method({**_recipe, "train_batch_size": _size}, _steps, few(_count))
    for _share in (20, 40):
        SETTINGS[f"{_name}, noisy-{_share}"] = Method(_recipe, _steps, noisy(_share / 100))
    for _number in (50, 100, 300, 1000):
        SETTINGS[f"{_name}, steps-{_number}"] = Method(_recipe, _number)
SETTINGS["softrepa, own-times"] = Method({**PUBLISHED, "share_timestep": False, "share_noise": False}, 500)

if __name__ == "__main__":
    main(methods=SETTINGS, description=__doc__)
