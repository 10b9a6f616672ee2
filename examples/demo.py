"""Demo on the embedded pipeline, a small Stable Diffusion 3 that was trained on drawn shapes.

    python examples/demo.py

1. Loads the pipeline from this repository, and an adapter with two lines.
2. Draws prompts without and with the adapter, from the same noise. The oracle, a checker that reads the shapes in an
   image, counts how often each skill succeeds; the difference is printed with its standard error.
3. Writes an image of prompts drawn without and with the adapter, framed by the verdicts.
4. Trains a new adapter for a minute or two, measures it in the same way, and draws its curves.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

import diffusers_softrepa  # noqa: F401  (gives pipelines the verbs)
from diffusers_softrepa.compat import drop_torchvision_hints

drop_torchvision_hints()  # which are logged when diffusers' pipelines are imported

from shapes_world.drawing import BASE, FOLDER, Measured, draw, framed, gain, load_base, measure  # noqa: E402
from shapes_world.train_adapter import RECIPE, pairs, train_tokens  # noqa: E402
from shapes_world.world import SKILLS, Ask, prompts  # noqa: E402

ADAPTER = FOLDER / "adapter"
SHOWN = (("counting", 1), ("color_attr", 0), ("position", 0), ("two_object", 0), ("long", 0), ("colors", 0))
SEEDS_SHOWN = 4


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    output, started = Path(given.output), time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)

    print("1. The embedded pipeline, and an adapter by two lines:")
    pipe = load_base(given.pipeline)
    count = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    print(f"   {type(pipe).__name__}, {count / 1e6:.1f} million parameters in its denoiser")
    print("       import diffusers_softrepa")
    print(f"       pipe.load_softrepa({str(given.adapter)!r})")
    pipe.load_softrepa(given.adapter)
    numbers = sum(parameter.numel() for parameter in pipe.softrepa_parameters().values())
    print(f"   {numbers} trained numbers; the weights of the denoiser do not change")

    asks = prompts(given.per_skill, seed=given.seed)
    print(f"2. {len(asks)} prompts, the same noise without and with it, guidance {given.guidance:g}; per cent right:")
    found = {}
    for name in ("base", "adapter"):
        pipe.disable_softrepa() if name == "base" else pipe.enable_softrepa()
        found[name] = measure(pipe, draw(pipe, asks, guidance=given.guidance, seed=given.seed), asks)
    print(_table(found, asks))

    path = output / "images.png"
    side_by_side(pipe, given.guidance).save(path)
    print(f"3. Prompts drawn without and with it, framed green where the oracle finds exactly what was asked: {path}")

    print(f"4. An adapter from scratch: {given.steps} steps of training on images made now")
    pipe.unload_softrepa()
    train(pipe, output / "trained", given.steps, given.seed)
    plot_curves(output / "trained" / "log.jsonl", output / "curves.png")
    found = {
        "base": found["base"],
        "trained": measure(pipe, draw(pipe, asks, guidance=given.guidance, seed=given.seed), asks),
    }
    print(_table(found, asks))
    print(f"   Curves: {output / 'curves.png'}, adapter: {output / 'trained'}")
    print(f"Done in {time.perf_counter() - started:.0f} s.")


def side_by_side(pipe: Any, guidance: float) -> Image.Image:
    """Returns a row for each prompt that is shown: the same seeds without and with the active adapter."""
    some = prompts(1 + max(place for _, place in SHOWN), seed=5)
    asks = [[ask for ask in some if ask.skill == skill][place] for skill, place in SHOWN]
    columns = {}
    for name in ("base model", "with soft tokens"):
        pipe.disable_softrepa() if name == "base model" else pipe.enable_softrepa()
        drawn = draw(pipe, [ask for ask in asks for _ in range(SEEDS_SHOWN)], guidance=guidance)
        columns[name] = [drawn[at : at + SEEDS_SHOWN] for at in range(0, len(drawn), SEEDS_SHOWN)]
    return framed(columns, asks)


def train(pipe: Any, folder: Path, steps: int, seed: int) -> None:
    """Trains a small adapter by contrast with the captions of other images and with captions written to be wrong."""
    train_tokens(
        pipe,
        folder,
        steps,
        pairs(600, seed + 1, hard=2),
        pairs(48, seed + 2, hard=2),
        {**RECIPE, "hard": 2},
        train_batch_size=6,
        logging_steps=max(1, steps // 20),
        eval_steps=max(1, steps // 4),
        seed=seed,
    )


def plot_curves(log: Path, path: Path) -> None:
    """Draws the curves of the loss and of the information of captions about images, for training and evaluation."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    labels = ("loss", "bound of mutual information, nats")
    for axis, key, label in zip(axes, ("loss", "information"), labels, strict=True):
        for prefix, name in (("", "training"), ("eval/", "evaluation")):
            points = [(entry["step"], entry[prefix + key]) for entry in entries if prefix + key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name, alpha=1 if prefix else 0.5)
        axis.set(xlabel="step", ylabel=label)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(found: dict[str, Measured], asks: Sequence[Ask]) -> str:
    """Returns the per cent right by skill; of the total, the paired difference with its standard error."""
    columns = {name: measured.accuracy(asks) for name, measured in found.items()}
    lines = [f"   {'':14s}" + "".join(f"{name:>10s}" for name in columns)]
    for key in (*SKILLS, "total"):
        lines.append(f"   {key:14s}" + "".join(f"{100 * column[key]:8.1f} %" for column in columns.values()))
    before, after = (measured.correct.astype(float) for measured in found.values())
    lines[-1] += "   {:+.1f} ± {:.1f}".format(*gain(after, before))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=BASE)
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of an adapter")
    parser.add_argument("--output", default="outputs/demo", help="folder; replaces what a demo left there")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--per-skill", type=int, default=20, help="prompts of every skill (default: 20)")
    parser.add_argument("--steps", type=int, default=150, help="training steps (default: 150)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
