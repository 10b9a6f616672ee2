"""The main job on the embedded pipeline: a small Stable Diffusion 3 that was really trained, in a world of shapes.

    python examples/demo.py [--adapter NAME]

1. Loads the pipeline from this repository and an adapter by two lines.
2. Draws some hundred prompts without and with it, from the same noise, lets the oracle read the pictures, and prints
   how often each skill succeeds.
3. Writes one picture of prompts drawn without and with the adapter.
4. Trains a small adapter for a minute and draws its curves.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "shapes_world"))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import BASE, Measured, draw, framed, load_base, measure
from study import ADAPTERS, pairs, train_tokens
from world import SKILLS, prompts

import diffusers_softrepa  # noqa: F401  (gives pipelines the verbs)

BEST = "softrepa-hard"  # of the adapters of the study


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
    print(f"   {numbers} learned numbers")

    asks = prompts(given.per_skill, seed=given.seed)
    print(f"2. {len(asks)} prompts, the same noise without and with it, guidance {given.guidance:g}")
    found, pictures = {}, {}
    for name in ("base", "adapter"):
        pipe.disable_softrepa() if name == "base" else pipe.enable_softrepa()
        pictures[name] = draw(pipe, asks, guidance=given.guidance, seed=given.seed)
        found[name] = measure(pipe, pictures[name], asks)
    print(_table(found, asks))

    rows = [
        skill * given.per_skill + place for skill in range(len(SKILLS)) for place in range(min(2, given.per_skill))
    ]
    columns = {name: [images[row : row + 1] for row in rows] for name, images in pictures.items()}
    path = output / "pictures.png"
    framed(columns, [asks[row] for row in rows]).save(path)
    print(f"3. Pictures, framed green where the oracle finds what was asked: {path}")

    print(f"4. A fresh adapter, {given.steps} steps of training on pictures made now")
    train(pipe, output / "trained", given.steps, given.seed)
    plot_curves(output / "trained" / "log.jsonl", output / "curves.png")
    print(f"   Curves: {output / 'curves.png'}, adapter: {output / 'trained'}")
    print(f"Done in {time.perf_counter() - started:.0f} s.")


def train(pipe: Any, folder: Path, steps: int, seed: int) -> None:
    """Trains a small adapter: contrast with true captions of other pictures and written wrong ones."""
    pipe.unload_softrepa()
    train_tokens(
        pipe,
        BEST,
        folder,
        steps,
        pairs(600, seed + 1, hard=2),
        pairs(48, seed + 2, hard=2),
        train_batch_size=6,
        logging_steps=max(1, steps // 20),
        validation_steps=max(1, steps // 6),
        seed=seed,
    )


def plot_curves(log: Path, path: Path) -> None:
    """Draws the loss, and how much captions tell of pictures, of training and of held-out ones."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    labels = ("loss", "bound of mutual information, nats")
    for axis, key, label in zip(axes, ("loss", "information"), labels, strict=True):
        for prefix, name in (("", "training"), ("held_out/", "held out")):
            points = [(entry["step"], entry[prefix + key]) for entry in entries if prefix + key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name, alpha=1 if prefix else 0.5)
        axis.set(xlabel="step", ylabel=label)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(found: dict[str, Measured], asks: Sequence[Any]) -> str:
    columns = {name: measured.accuracy(asks) for name, measured in found.items()}
    lines = [f"   {'':14s}" + "".join(f"{name:>10s}" for name in columns)]
    for key in (*SKILLS, "total"):
        lines.append(f"   {key:14s}" + "".join(f"{100 * column[key]:8.1f} %" for column in columns.values()))
    lines.append(f"   {'shape quality':14s}" + "".join(f"{m.quality.mean():10.3f}" for m in found.values()))
    lines.append(f"   {'things too many':15s}" + "".join(f"{m.counted.mean():+9.2f} " for m in found.values()))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=BASE)
    parser.add_argument("--adapter", type=Path, default=ADAPTERS / BEST, help="folder of an adapter")
    parser.add_argument("--output", default="outputs/demo", help="folder; replaces what a demo left there")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--per-skill", type=int, default=20, help="prompts of every skill (default: 20)")
    parser.add_argument("--steps", type=int, default=120, help="training steps (default: 120)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
