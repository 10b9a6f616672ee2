"""What the base knows and does not show: errors of true and of false captions, by noise level and phrasing.

    python research/why.py                                        # the base
    python research/why.py --adapter examples/shapes_world/adapter

A contrast learns from how far the error of a false caption lies above that of the true one. In the exact phrasing the
base tells them apart; in the everyday phrasings, which it met with false captions, it does so less, although it reads
the same words with the same encoders. With an adapter the second comes near the first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_softrepa.conditioning import conditioner_of
from shapes_world.drawing import BASE, as_input, load_base
from shapes_world.models import MAX_WORDS
from shapes_world.world import SKILLS, Ask, random_ask, random_background, render

TIMESTEPS = (950, 850, 700, 500, 300, 100)
PHRASINGS = ("everyday", "exact")


def errors(pipe: Any, count: int, seed: int = 0) -> dict[int, dict[str, dict[str, float]]]:
    """Returns by timestep and phrasing what the errors of true and of false captions are.

    That is: the mean error of true captions, how far that of false ones lies above it, and the share of images for
    which it does.

    Args:
        pipe: The base, with an adapter or without.
        count: Images, of skills that speak of several things.
        seed: Of images and noise.
    """
    rng, skills = np.random.default_rng(seed), [skill for skill in SKILLS if skill not in ("single_object", "colors")]
    asks, images, wrong = [], [], []
    for number in range(count):
        ask = random_ask(rng, skills[number % len(skills)])
        things = ask.scene(rng)
        asks.append(ask)
        images.append(render(things, random_background(rng)))
        wrong.append(ask.false_of(things, rng) or ask)
    conditioner = conditioner_of(pipe, max_sequence_length=MAX_WORDS)
    latents = conditioner.encode_images(as_input(images))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    table: dict[int, dict[str, dict[str, float]]] = {}
    for timestep in TIMESTEPS:
        level = torch.full((count,), float(timestep))
        noisy = conditioner.noising.noisy_latents(latents, noise, level)
        target = conditioner.noising.target(latents, noise, level)

        def error(
            some: Sequence[Ask], noisy: Tensor = noisy, level: Tensor = level, target: Tensor = target
        ) -> Tensor:
            with torch.no_grad():
                captions = conditioner.encode_captions([ask.caption for ask in some])
                return (conditioner.predict(noisy, level, captions) - target).square().mean((1, 2, 3))

        for phrasing in PHRASINGS:
            said = (asks, wrong) if phrasing == "everyday" else ([a.exactly() for a in s] for s in (asks, wrong))
            true, false = (error(some) for some in said)
            table.setdefault(timestep, {})[phrasing] = {
                "error": float(true.mean()),
                "gap": float((false - true).mean()),
                "told": float((false > true).float().mean()),
            }
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--adapter", type=Path, help="folder of an adapter")
    parser.add_argument("--count", type=int, default=256, help="images")
    args = parser.parse_args(arguments)
    pipe = load_base(args.base)
    if args.adapter is not None:
        pipe.load_softrepa(args.adapter)
    print("| timestep | phrasing | error | false above true | told apart |\n" + "| --- " * 5 + "|")
    for timestep, rows in errors(pipe, args.count).items():
        for name, row in rows.items():
            print(
                f"| {timestep} | {name} | {row['error']:.4f} | {row['gap']:.4f} | {100 * row['told']:.0f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
