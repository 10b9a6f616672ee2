"""The study of the shapes world: trains every adapter with several seeds, measures all of them, writes the table.

    python research/study.py                       # everything; what is there already is not done again
    python research/study.py train softrepa agsm   # some adapters
    python research/study.py measure --seeds 5 --guidance 1 2 4
    python research/study.py table
    python research/study.py compare ours softrepa denoising             # paired differences of the first
    python research/study.py figure ours --guidance 1 --skills colors two_object counting color_attr position

Adapters are kept in `--adapters`, a folder for each method and seed, measurements in `--out`, a file for each adapter,
guidance scale and seed, so the study can be interrupted. Several processes can share it: give each some of the names.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shapes_world.drawing import BASE, Measured, draw, features, framed, load_base, mean_and_error, measure, right
from shapes_world.train_adapter import (
    BATCH,
    EVALUATED,
    HIGH_NOISE,
    IMAGES,
    RECIPE,
    STEPS,
    load_lora,
    pairs,
    train_lora,
    train_tokens,
)
from shapes_world.world import SKILLS, Ask, prompts, random_ask, random_background, render

ADAPTERS = Path(__file__).parent / "adapters"
BASE_ROWS = ("base", "base, exact phrasing")  # the base alone: as everyone asks, and as it knows how to follow
PUBLISHED: dict[str, Any] = {"share_timestep": True, "share_noise": True, "learning_rate": 1e-3}
LORA = "lora"
TITLES = {"base": "base model", "ours": "with soft tokens"}  # in figures; other rows are called as in the table

Rows = Callable[[int, int], list[dict[str, Any]]]  # from a seed and a number of written negatives


def all_images(seed: int, hard: int) -> list[dict[str, Any]]:
    """Returns the images that adapters learn from unless a setting says otherwise."""
    return pairs(IMAGES, seed + 10, hard)


@dataclass(frozen=True)
class Method:
    """How an adapter is trained.

    Attributes:
        recipe: What differs from the trainer's defaults; as `train_adapter.train_tokens` takes it. Unused by a LoRA.
        steps: Optimizer steps. A step is 64 predictions, 88 with written negatives, whatever is made of them.
        rows: What it learns from.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    rows: Rows = all_images


DENOISING: dict[str, Any] = {"objective": "denoising", "train_batch_size": BATCH**2, **HIGH_NOISE}
METHODS: dict[str, Method] = {
    "softrepa": Method(PUBLISHED, steps=500),  # the learning rate is a third of the others'
    "ours": Method(RECIPE),
    "agsm": Method({"objective": "agsm"}),
    "soft-rank": Method({"objective": "soft_rank"}),
    "denoising": Method(DENOISING),  # ours without contrast
    LORA: Method(),
}


def adapter_folder(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Returns where an adapter is kept."""
    return args.adapters / f"{as_file_name(name)}-{seed}"


def as_file_name(name: str) -> str:
    """Returns the name of a row without commas and spaces."""
    return name.replace(", ", "-").replace(" ", "-")


def train(name: str, seed: int, args: argparse.Namespace) -> None:
    """Trains one adapter, if it is not there."""
    folder, method, pipe = adapter_folder(name, seed, args), args.methods[name], load_base(args.base)
    if folder.exists():
        return
    steps = args.steps or method.steps
    if name == LORA:
        train_lora(pipe, folder, steps, method.rows(seed, 0), seed)
    else:
        rows = method.rows(seed, method.recipe.get("hard", 0))
        train_tokens(pipe, folder, steps, rows, pairs(EVALUATED, 9), dict(method.recipe), seed=seed)


def prepared(name: str, seed: int, args: argparse.Namespace) -> Any:
    """Returns the base pipeline with an adapter of a row of the table on it, if the row has one."""
    pipe = load_base(args.base)
    if name == LORA:
        load_lora(pipe, adapter_folder(name, seed, args))
    elif name not in BASE_ROWS:
        pipe.load_softrepa(adapter_folder(name, seed, args))
    return pipe


def asked(name: str, seed: int, args: argparse.Namespace) -> list[Ask]:
    """Returns the prompts of a row of the table."""
    asks = prompts(args.per_skill, seed)
    return [ask.exactly() for ask in asks] if name == "base, exact phrasing" else asks


def training_seeds(name: str, args: argparse.Namespace) -> range:
    """Returns the seeds with which the adapter of a row was trained; one for rows without an adapter."""
    return range(1 if name in BASE_ROWS else args.training_seeds)


def saved_at(name: str, trained: int, guidance: float, seed: int, args: argparse.Namespace) -> Path:
    """Returns where a measurement is kept."""
    return args.out / f"{as_file_name(name)}-{trained}-g{guidance:g}-s{seed}.npz"


def measure_all(names: Sequence[str], args: argparse.Namespace) -> None:
    """Makes the measurements that are missing."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        for trained in training_seeds(name, args):
            pipe = None
            for guidance in args.guidance:
                for seed in range(args.seeds):
                    path = saved_at(name, trained, guidance, seed, args)
                    if path.exists():
                        continue
                    pipe = pipe or prepared(name, trained, args)
                    asks = asked(name, seed, args)
                    found = measure(pipe, draw(pipe, asks, guidance=guidance, seed=seed), asks)
                    np.savez_compressed(path, **vars(found))
                    line = " ".join(f"{skill} {100 * value:.0f}" for skill, value in found.accuracy(asks).items())
                    print(f"{name:14s} {trained} guidance {guidance:g} seed {seed}: {line}", flush=True)


def load_measured(
    name: str, guidance: float, args: argparse.Namespace
) -> tuple[list[list[Measured]], list[list[Ask]]] | None:
    """Returns the measurements of a row, by training seed and by seed of the images, and what was asked."""
    paths = [
        [saved_at(name, trained, guidance, seed, args) for seed in range(args.seeds)]
        for trained in training_seeds(name, args)
    ]
    paths = [some for some in paths if all(path.exists() for path in some)]
    if not paths:
        return None
    runs = [[Measured(**np.load(path)) for path in some] for some in paths]
    return runs, [asked(name, seed, args) for seed in range(args.seeds)]


def figure(args: argparse.Namespace, seeds: int = 4) -> Image.Image:
    """Returns the first prompt of each skill, drawn from the same noise by the base and by the named adapters."""
    skills = args.skills or SKILLS
    asks = [next(ask for ask in prompts(args.per_skill, 0) if ask.skill == skill) for skill in skills]
    asked = [ask for ask in asks for _ in range(seeds)]
    columns = {}
    for name in ("base", *args.names):
        images = draw(prepared(name, 0, args), asked, guidance=args.guidance[0])
        title = f"{TITLES.get(name, name)}: {right(images, asked).sum():.0f} of {len(asked)} right"
        columns[title] = [images[start : start + seeds] for start in range(0, len(images), seeds)]
    return framed(columns, asks, scale=4)


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the Frechet distance of the normal distributions of two sets of features, (n, d) each."""
    spread, other = (np.cov(part, rowvar=False) for part in (first, second))
    values, vectors = np.linalg.eigh(spread)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ other @ root).clip(0)
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(spread + other) - 2 * np.sqrt(mixed).sum())


def gain_and_errors(correct: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Returns the mean paired difference of two rows, and its standard error, of images and of training together.

    The prompts are the same for every training seed. So the variance of the mean is that of prompts (of differences
    averaged over training seeds), plus what training adds: the variance between the means of training seeds, over
    their number, of either row.

    Args:
        correct: By training seed and image, (seeds, images) bool.
        base: The same of what it is compared with, (seeds, images) bool.
    """
    first, second = correct.astype(float), base.astype(float)
    difference = first.mean(0) - second.mean(0)  # (images,)
    gain, images_error = mean_and_error(difference)
    spread = float(np.hypot(*(_over_trainings(row.mean(1))[1] for row in (first, second))))
    return {"gain": gain, "error": float(np.hypot(images_error, spread)), "training": spread}


def compare(names: Sequence[str], args: argparse.Namespace) -> str:
    """Returns a table of the first row's paired differences from the others, a column for each guidance scale.

    Raises:
        FileNotFoundError: A row has not been measured at one of the scales.
    """
    correct = {}
    for name in names:
        for scale in args.guidance:
            found = load_measured(name, scale, args)
            if found is None:
                raise FileNotFoundError(
                    f"{args.out} has no images of {name} at guidance {scale:g}; measure them first"
                )
            correct[name, scale] = _correct(found[0])
    lines = ["| " + " | ".join([f"{names[0]} less", *(f"guidance {scale:g}" for scale in args.guidance)]) + " |"]
    lines.append("| --- " * (1 + len(args.guidance)) + "|")
    for name in names[1:]:
        gains = [gain_and_errors(correct[names[0], scale], correct[name, scale]) for scale in args.guidance]
        cells = [f"{100 * gain['gain']:+.1f} ± {100 * gain['error']:.1f}" for gain in gains]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _correct(runs: Sequence[Sequence[Measured]]) -> np.ndarray:
    """Returns which images are right, by training seed, (seeds, images) bool."""
    return np.stack([np.concatenate([run.correct for run in some]) for some in runs])


def results(names: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the figures of every row and guidance scale that has been measured for all seeds of the images."""
    base = load_base(args.base)
    rng = np.random.default_rng(12345)
    real = features(base, [render(random_ask(rng).scene(rng), random_background(rng)) for _ in range(2000)])
    table: dict[str, dict[str, Any]] = {}
    for scale in args.guidance:
        found = load_measured("base", scale, args)
        of_base = None if found is None else _correct(found[0])
        for name in names:
            found = load_measured(name, scale, args)
            if found is None:
                continue
            runs, asks = found
            scores = [
                {
                    key: float(np.mean([trained[seed].accuracy(some)[key] for trained in runs]))
                    for key in (*SKILLS, "total")
                }
                for seed, some in enumerate(asks)
            ]
            row: dict[str, Any] = {
                "accuracy": {key: _over_trainings([score[key] for score in scores]) for key in scores[0]},
                "quality": float(np.mean([run.quality.mean() for some in runs for run in some])),
                "counted": float(np.mean([run.counted.mean() for some in runs for run in some])),
                "distance": float(
                    np.mean([frechet(np.concatenate([run.features for run in some]), real) for some in runs])
                ),
                "trained": len(runs),
                **_diagnostics(adapter_folder(name, 0, args) / "log.jsonl"),
            }
            if of_base is not None and name != "base":
                row |= gain_and_errors(_correct(runs), of_base)
            table.setdefault(name, {})[f"{scale:g}"] = row
    return table


def as_markdown(table: Mapping[str, Mapping[str, Any]], scale: str) -> str:
    """Returns a table of all rows at one guidance scale."""
    headings = ["row", *SKILLS, "**total**", "gain", "of it training", "too many", "shape quality", "Frechet"]
    lines = ["| " + " | ".join([*headings, "top-1", "information"]) + " |", "| --- " * (len(headings) + 2) + "|"]
    for name, scales in table.items():
        if scale not in scales:
            continue
        row = scales[scale]
        percent = {key: f"{100 * mean:.0f}" for key, (mean, _) in row["accuracy"].items()}
        cells = [name, *(percent[skill] for skill in SKILLS)]
        cells.append("**{:.1f} ± {:.1f}**".format(*(100 * number for number in row["accuracy"]["total"])))
        cells.append(f"{100 * row['gain']:+.1f} ± {100 * row['error']:.1f}" if "gain" in row else "")
        cells.append(f"{100 * row['training']:.1f}" if row["trained"] > 1 else "")
        cells += [f"{row['counted']:+.2f}", f"{row['quality']:.3f}", f"{row['distance']:.2f}"]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("top1", "information")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _over_trainings(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard error over training seeds; the error is 0 with one seed, as for the base model."""
    return mean_and_error(values) if len(values) > 1 else (float(values[0]), 0.0)


def _diagnostics(log: Path) -> dict[str, float]:
    """Returns the last evaluation of a training log, if there is one."""
    found: dict[str, float] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        found |= {key: entry[f"eval/{key}"] for key in ("top1", "information") if f"eval/{key}" in entry}
    return found


def main(
    arguments: Sequence[str] | None = None, methods: Mapping[str, Method] = METHODS, description: str | None = __doc__
) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="?", choices=["all", "train", "measure", "table", "compare", "figure"], default="all"
    )
    parser.add_argument("names", nargs="*", help="rows of the table; all unless given")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    parser.add_argument("--out", type=Path, default=Path("outputs/study"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--seeds", type=int, default=5, help="of the images that are measured")
    parser.add_argument("--training-seeds", type=int, default=3, help="of the training of each adapter")
    parser.add_argument("--per-skill", type=int, default=20)
    parser.add_argument("--steps", type=int, help="training steps of every adapter, instead of its own")
    parser.add_argument("--skills", nargs="+", choices=SKILLS, metavar="SKILL", help="rows of the figure")
    args = parser.parse_args(arguments)
    args.methods = methods
    names = args.names or [*BASE_ROWS, *args.methods]
    for name in names if args.part in ("all", "train") else ():
        for seed in training_seeds(name, args) if name not in BASE_ROWS else ():
            train(name, seed, args)
    if args.part in ("all", "measure"):
        measure_all(names, args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "compare":
        print(compare(names, args))
    if args.part == "figure":
        figure(args).save(args.out / "figure.png", optimize=True)
    if args.part in ("all", "table"):
        table = results(names, args)
        (args.out / "results.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        scales = [f"{scale:g}" for scale in args.guidance]
        text = "\n\n".join(f"Guidance {scale}:\n\n" + as_markdown(table, scale) for scale in scales)
        (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
