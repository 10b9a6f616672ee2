"""What the base knows and does not show, and what soft tokens can make of it.

    python examples/shapes_world/why.py errors     # of true and of false captions, by noise level and tag
    python examples/shapes_world/why.py tag        # the tag given as soft tokens, and what it changes
    python examples/shapes_world/why.py guidance   # how much of guidance soft tokens can learn to do

`errors` is what a contrast learns from: how far the error of a false caption lies above that of the true one, and what
the tag, which says that a caption is exact, does to both. `tag` asks whether soft tokens stand where they can do what
the tag does: its text states before each block are shown to the blocks of other captions as tokens. `guidance` trains
tokens to predict what the guided base predicts: more than they take on there, no objective can make them do.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import BASE, as_input, draw, load_base, measure
from models import MAX_WORDS
from study import pairs
from torch import Tensor
from world import SKILLS, TAG, Ask, prompts, random_ask, random_background, render

from diffusers_softrepa import SoftREPAConfig
from diffusers_softrepa.conditioning import conditioner_of

TIMESTEPS = (950, 850, 700, 500, 300, 100)
# Where the tag stands behind three words of caption in the text stream: two letters in CLIP's part, after the token
# that begins it, and in T5's part a space and two letters.
TAG_PLACES = (4, 5, MAX_WORDS + 3, MAX_WORDS + 4, MAX_WORDS + 5)


def errors(pipe: Any, count: int, seed: int = 0) -> dict[int, dict[str, dict[str, float]]]:
    """Returns by timestep and tag ("" for none) what the errors of true and of false captions are.

    That is: the mean error of true captions, how far that of false ones lies above it, the share of pictures for which
    it does, and how far the error of the true caption lies above that of the same with the tag.

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

        exact = error([ask.tagged() for ask in asks])
        for tag in ("", TAG):
            true, false = error([ask.tagged(tag) for ask in asks]), error([ask.tagged(tag) for ask in wrong])
            table.setdefault(timestep, {})[tag] = {
                "error": float(true.mean()),
                "gap": float((false - true).mean()),
                "told": float((false > true).float().mean()),
                "above": float((true - exact).mean()),
            }
    return table


def tag_as_tokens(pipe: Any, count: int = 128, seed: int = 0) -> Tensor:
    """Returns the mean text states of the tag before each block, (blocks, 5, D), over captions and noise levels."""
    rng = np.random.default_rng(seed)
    asks = [random_ask(rng, "colors").tagged() for _ in range(count)]  # three words each: the tag has one place
    conditioner = conditioner_of(pipe, max_sequence_length=MAX_WORDS)
    latents = conditioner.encode_images(as_input([render(ask.scene(rng)) for ask in asks]))
    captions = conditioner.encode_captions([ask.caption for ask in asks])
    seen: list[list[Tensor]] = [[] for _ in pipe.transformer.transformer_blocks]

    def keep(_: Any, __: Any, given: dict[str, Tensor], place: int) -> None:
        seen[place].append(given["encoder_hidden_states"][:, list(TAG_PLACES)].mean(0))

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
    return torch.stack([torch.stack(states).mean(0) for states in seen])  # (blocks, 5, D)


def tag(pipe: Any, per_skill: int, guidance: float, layers: int = 5) -> dict[str, float]:
    """Returns the accuracy of prompts as they are, with the tag as soft tokens, and with the tag itself."""
    asks = prompts(per_skill, 0)
    config = SoftREPAConfig.for_denoiser(
        pipe.transformer, num_tokens=len(TAG_PLACES), num_layers=layers, num_timestep_bins=None
    )
    found = {"base": accuracy(pipe, asks, guidance)}
    pipe.load_softrepa({"tokens": tag_as_tokens(pipe)[:layers].clone()}, config=config)
    found["tag as tokens"] = accuracy(pipe, asks, guidance)
    pipe.unload_softrepa()
    found["tagged"] = accuracy(pipe, [ask.tagged() for ask in asks], guidance)
    return found


def learned_guidance(pipe: Any, steps: int, scale: float, *, batch: int = 64, seed: int = 0) -> list[float]:
    """Trains tokens to predict what the base predicts under guidance; returns how much of the way they have come.

    Args:
        pipe: The base.
        steps: Of Adam, at a rate that falls from 0.01 to 0; tokens begin at size 1, that of what they stand beside.
        scale: Of the guidance.
        batch: Pictures a step.
        seed: Of pictures, noise and tokens.

    Returns:
        For every fifty steps, the share of the squared distance from plain to guided predictions that is gone.
    """
    conditioner = conditioner_of(pipe, max_sequence_length=MAX_WORDS)
    rows = pairs(2000, seed + 10)
    with torch.no_grad():
        latents = torch.cat(
            [
                conditioner.encode_images(as_input([row["image"] for row in rows[at : at + 200]]))
                for at in range(0, len(rows), 200)
            ]
        )
    empty = conditioner.encode_captions([""] * batch)
    torch.manual_seed(seed)
    pipe.transformer.requires_grad_(False)
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(pipe.transformer, num_timestep_bins=10, init_std=1.0))
    tokens = list(pipe.softrepa_parameters().values())
    optimizer = torch.optim.Adam(tokens, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found, left, whole = [], 0.0, 0.0
    for step in range(1, steps + 1):
        some = torch.randint(len(rows), (batch,)).tolist()
        noise, timestep = torch.randn_like(latents[some]), 1000 * torch.rand(batch)
        noisy = conditioner.noising.noisy_latents(latents[some], noise, timestep)
        captions = conditioner.encode_captions([rows[row]["text"] for row in some])
        pipe.disable_softrepa()
        with torch.no_grad():
            plain, bare = (conditioner.predict(noisy, timestep, text) for text in (captions, empty))
        pipe.enable_softrepa()
        shift = (scale - 1) * (plain - bare)
        loss = (conditioner.predict(noisy, timestep, captions) - plain - shift).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        left, whole = left + loss.item(), whole + shift.square().mean().item()
        if step % 50 == 0 or step == steps:
            found.append(1 - left / whole)
            left, whole = 0.0, 0.0
    pipe.unload_softrepa()
    return found


def accuracy(pipe: Any, asks: Sequence[Ask], guidance: float) -> float:
    """Returns the share of prompts of which the picture is right."""
    return float(measure(pipe, draw(pipe, asks, guidance=guidance), asks).correct.mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["errors", "tag", "guidance"])
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--count", type=int, default=256, help="pictures of `errors`")
    parser.add_argument("--per-skill", type=int, default=60, help="prompts of every skill of `tag`")
    parser.add_argument("--steps", type=int, default=300, help="of the training of `guidance`")
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args(arguments)
    pipe = load_base(args.base)
    if args.part == "tag":
        for name, share in tag(pipe, args.per_skill, args.guidance).items():
            print(f"{name:16s} {100 * share:.1f} %")
    elif args.part == "guidance":
        for number, share in enumerate(learned_guidance(pipe, args.steps, args.guidance), 1):
            print(
                f"{min(50 * number, args.steps):4d} steps: {100 * share:.1f} % of guidance {args.guidance:g}",
                flush=True,
            )
    else:
        print("| timestep | tag | error | false above true | told apart | above the tagged |\n" + "| --- " * 6 + "|")
        for timestep, tags in errors(pipe, args.count).items():
            for name, row in tags.items():
                told = f"{100 * row['told']:.0f} %"
                print(f"| {timestep} | {name} | {row['error']:.4f} | {row['gap']:.4f} | {told} | {row['above']:.4f} |")


if __name__ == "__main__":
    main()
