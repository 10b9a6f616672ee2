"""Why adapters move this base so little: what its errors say of captions, and what a style of sentence does inside it.

    python examples/shapes_world/why.py errors    # by noise level and style, of true captions and of false ones
    python examples/shapes_world/why.py words     # the words "there is" given as soft tokens, and what they change

`errors` is what a contrast learns from: how far the error of a false caption lies above that of the true one, and how
much lower both are when captions are put as descriptions. `words` asks whether soft tokens could do what that style
does: the text states of its two words, read before each block, are shown to the blocks of other captions as tokens.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import BASE, as_input, draw, load_base, measure
from models import MAX_WORDS
from torch import Tensor
from world import SKILLS, STYLES, Ask, prompts, random_ask, random_background, render

from diffusers_softrepa import SoftREPAConfig
from diffusers_softrepa.conditioning import conditioner_of

TIMESTEPS = (950, 850, 700, 500, 300, 100)
WORDS = (1, 2, MAX_WORDS, MAX_WORDS + 1)  # where "there is" stands in the text stream: in CLIP's part and in T5's


def errors(pipe: Any, count: int, seed: int = 0) -> dict[int, dict[str, dict[str, float]]]:
    """Returns by timestep and style: the mean error of true captions, how far that of false ones lies above it, the
    share of pictures for which it does, and how far the error of the true caption lies above that of its description.

    Args:
        pipe: The base.
        count: Pictures, of skills that speak of several things.
        seed: Of pictures and noise.
    """
    rng, skills = np.random.default_rng(seed), [skill for skill in SKILLS if skill not in ("single_object", "colors")]
    asks, images, wrong = [], [], []
    for number in range(count):
        ask = random_ask(rng, skills[number % len(skills)])
        things = ask.scene(rng)
        false = [other for kind in ask.negatives().values() for other in kind if not other.true_of(things)]
        asks.append(ask)
        images.append(render(things, random_background(rng)))
        wrong.append(false[rng.integers(len(false))])
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

        described = error([ask.styled("description") for ask in asks])
        for style in STYLES:
            true, false = error([ask.styled(style) for ask in asks]), error([ask.styled(style) for ask in wrong])
            table.setdefault(timestep, {})[style] = {
                "error": float(true.mean()),
                "gap": float((false - true).mean()),
                "told": float((false > true).float().mean()),
                "above": float((true - described).mean()),
            }
    return table


def words_as_tokens(pipe: Any, count: int = 128, seed: int = 0) -> Tensor:
    """Returns the mean text states of "there is" before each block, (blocks, 4, D), over captions and noise levels."""
    rng = np.random.default_rng(seed)
    asks = [ask for ask in (random_ask(rng).styled("description") for _ in range(count)) if ask.wants[0].count == 1]
    conditioner = conditioner_of(pipe, max_sequence_length=MAX_WORDS)
    latents = conditioner.encode_images(as_input([render(ask.scene(rng)) for ask in asks]))
    captions = conditioner.encode_captions([ask.caption for ask in asks])
    seen: list[list[Tensor]] = [[] for _ in pipe.transformer.transformer_blocks]

    def keep(_: Any, __: Any, given: dict[str, Tensor], place: int) -> None:
        seen[place].append(given["encoder_hidden_states"][:, list(WORDS)].mean(0))

    handles = [
        block.register_forward_pre_hook(lambda *given, place=place: keep(*given, place=place), with_kwargs=True)
        for place, block in enumerate(pipe.transformer.transformer_blocks)
    ]
    try:
        for timestep in (950, 850, 750, 650, 550):
            level = torch.full((len(asks),), float(timestep))
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep))
            with torch.no_grad():
                conditioner.predict(conditioner.noising.noisy_latents(latents, noise, level), level, captions)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.stack(states).mean(0) for states in seen])  # (blocks, 4, D)


def words(pipe: Any, per_skill: int, guidance: float, layers: int = 5) -> dict[str, float]:
    """Returns the accuracy of prompts as they are, with the words as soft tokens, and put as descriptions."""
    asks = prompts(per_skill, 0)
    config = SoftREPAConfig.for_denoiser(
        pipe.transformer, num_tokens=len(WORDS), num_layers=layers, num_timestep_bins=None
    )
    found = {"base": accuracy(pipe, asks, guidance)}
    pipe.load_softrepa({"tokens": words_as_tokens(pipe)[:layers].clone()}, config=config)
    found["words as tokens"] = accuracy(pipe, asks, guidance)
    pipe.unload_softrepa()
    found["described"] = accuracy(pipe, [ask.styled("description") for ask in asks], guidance)
    return found


def accuracy(pipe: Any, asks: Sequence[Ask], guidance: float) -> float:
    """Returns the share of prompts of which the picture is right."""
    return float(measure(pipe, draw(pipe, asks, guidance=guidance), asks).correct.mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["errors", "words"])
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--count", type=int, default=256, help="pictures of `errors`")
    parser.add_argument("--per-skill", type=int, default=60, help="prompts of every skill of `words`")
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args(arguments)
    pipe = load_base(args.base)
    if args.part == "words":
        for name, share in words(pipe, args.per_skill, args.guidance).items():
            print(f"{name:16s} {100 * share:.1f} %")
        return
    print(
        "| timestep | style | error | false above true | told apart | above its description |\n" + "| --- " * 6 + "|"
    )
    for timestep, styles in errors(pipe, args.count).items():
        for style, row in styles.items():
            told = f"{100 * row['told']:.0f} %"
            print(f"| {timestep} | {style} | {row['error']:.4f} | {row['gap']:.4f} | {told} | {row['above']:.4f} |")


if __name__ == "__main__":
    main()
