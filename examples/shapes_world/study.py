"""The study: trains every adapter of the shapes world, measures all of them, writes the table.

    python examples/shapes_world/study.py                       # everything; what is there already is not done again
    python examples/shapes_world/study.py train softrepa agsm   # some adapters
    python examples/shapes_world/study.py measure --seeds 5 --guidance 1 2 4
    python examples/shapes_world/study.py table
    python examples/shapes_world/study.py picture softrepa lora --guidance 2

Adapters are kept in `adapters/`, one folder each, measurements in `--out`, a file for each adapter, guidance scale and
seed, so the study can be interrupted. Several processes can share it: give each some of the names.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import BASE, FOLDER, Measured, as_input, draw, features, framed, load_base, measure
from models import MAX_WORDS
from peft import LoraConfig
from PIL import Image
from world import SIZE, SKILLS, TAG, Ask, prompts, random_ask, random_background, render

from diffusers_softrepa import SoftREPAConfig
from diffusers_softrepa.conditioning import conditioner_of
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer

ADAPTERS = FOLDER / "adapters"
PICTURES = 2000  # that adapters learn from, captions all true
LEARNING_RATE, BATCH, STEPS = 3e-3, 8, 500

# What differs from the trainer's defaults. `hard`: captions written to be wrong join the negatives of an image;
# `config`: of the tokens. A step is 64 predictions (88 with written negatives), whatever is made of them.
# At high noise is decided what is drawn.
HIGH_NOISE: dict[str, Any] = {"min_timestep": 400.0, "config": {"num_timestep_bins": 10}}
VARIANTS: dict[str, dict[str, Any]] = {
    "softrepa": {"share_timestep": True, "share_noise": True, "learning_rate": 1e-3},
    "softrepa-hard": {
        "logits": "linear",
        "temperature": 0.05,
        "denoising_weight": 50.0,
        "hard": 3,
        **HIGH_NOISE,
    },
    "agsm": {"objective": "agsm"},
    "soft-rank": {"objective": "soft_rank"},
    "denoising": {"objective": "denoising", "train_batch_size": BATCH**2, **HIGH_NOISE},  # ours without contrast
}
LORA, LORA_LEARNING_RATE = "lora", 1e-3  # plain denoising, as many numbers as the tokens
BASE_ROWS = {"base": "", "base, tagged": TAG}  # the base alone: as everyone asks, and with what tells it to be exact


def pairs(count: int, seed: int, hard: int = 0) -> list[dict[str, Any]]:
    """Returns pictures with true captions and, for each, `hard` captions that are wrong in one thing."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ask = random_ask(rng)
        things = ask.scene(rng)
        wrong = [other for kind in ask.negatives().values() for other in kind if not other.true_of(things)]
        chosen = [wrong[i] for i in rng.permutation(len(wrong))[:hard]]
        rows.append(
            {
                "image": render(things, random_background(rng)),
                "text": ask.caption,
                "negatives": [other.rephrased(rng).caption for other in chosen],
            }
        )
    return rows


def trainer_arguments(folder: Path, steps: int, **changes: Any) -> ContrastiveFlowMatchingArguments:
    """Returns the settings with which tokens are trained in this world."""
    settings = {
        "train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "pair_chunk_size": 64,
        "resolution": SIZE,
        "max_sequence_length": MAX_WORDS,
        "max_steps": steps,
        "save_steps": steps,
        "report_to": "none",
    }
    return ContrastiveFlowMatchingArguments(output_dir=str(folder), **{**settings, **changes})


def train(name: str, out: Path, base: Path, *, steps: int = STEPS, seed: int = 0, **changes: Any) -> Path:
    """Trains one adapter; returns its folder below `out`."""
    folder = out / name
    if name == LORA:
        return train_lora(folder, base, steps=steps, seed=seed)
    hard = {**VARIANTS[name], **changes}.get("hard", 0)
    train_tokens(
        load_base(base), name, folder, steps, pairs(PICTURES, seed + 10, hard), pairs(64, 9), seed=seed, **changes
    )
    return folder


def train_tokens(
    pipe: Any,
    name: str,
    folder: Path,
    steps: int,
    rows: Sequence[dict[str, Any]],
    held_out: Sequence[dict[str, Any]],
    **changes: Any,
) -> None:
    """Trains the tokens of one of the `VARIANTS` on rows as `pairs` makes them; leaves no checkpoints behind."""
    settings = {"validation_steps": steps, **VARIANTS[name], **changes}
    hard, config = settings.pop("hard", 0), settings.pop("config", {})
    negatives = {"negative_caption_column": "negatives"} if hard else {}
    arguments = trainer_arguments(folder, steps, **negatives, **settings)
    tokens = SoftREPAConfig.for_denoiser(pipe.transformer, **config)
    ContrastiveFlowMatchingTrainer(pipe, arguments, rows, held_out, adapter_config=tokens).train()
    for left in (*folder.glob("checkpoint-*"), folder / "best"):
        shutil.rmtree(left, ignore_errors=True)


def train_lora(folder: Path, base: Path, *, steps: int, seed: int) -> Path:
    """Trains a LoRA on the attention of all blocks by plain denoising on the same pairs."""
    pipe = load_base(base)
    tokens = SoftREPAConfig.for_denoiser(pipe.transformer).num_parameters
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]
    width, blocks = pipe.transformer.inner_dim, len(pipe.transformer.transformer_blocks)
    rank = max(1, round(tokens / (2 * width * blocks * len(targets))))
    torch.manual_seed(seed)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    weights = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LORA_LEARNING_RATE, weight_decay=1e-4)
    conditioner, rows = conditioner_of(pipe, max_sequence_length=MAX_WORDS), pairs(PICTURES, seed + 10)
    noising, rng = conditioner.noising, np.random.default_rng(seed)
    for _ in range(steps):
        some = [rows[i] for i in rng.integers(len(rows), size=BATCH**2)]
        latents = conditioner.encode_images(as_input([row["image"] for row in some]))
        noise, timestep = torch.randn_like(latents), 1000 * torch.rand(len(some))
        noisy = noising.noisy_latents(latents, noise, timestep)
        prediction = conditioner.predict(noisy, timestep, conditioner.encode_captions([row["text"] for row in some]))
        loss = (prediction - noising.target(latents, noise, timestep)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pipe.transformer.save_lora_adapter(folder)
    return folder


def prepared(name: str, args: argparse.Namespace) -> Any:
    """Returns the base pipeline with the adapter of a row of the table on it, if the row has one."""
    pipe = load_base(args.base)
    if name not in BASE_ROWS:
        put_on(pipe, args.adapters / name)
    return pipe


def put_on(pipe: Any, folder: Path) -> None:
    """Puts an adapter of the study on a base pipeline that has none."""
    if folder.name == LORA:
        pipe.transformer.load_lora_adapter(
            str(folder), prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
        )
    else:
        pipe.load_softrepa(folder)


def asked(name: str, seed: int, args: argparse.Namespace) -> list[Ask]:
    """Returns the prompts of a row of the table."""
    return [ask.tagged(BASE_ROWS.get(name, "")) for ask in prompts(args.per_skill, seed)]


def saved_at(name: str, guidance: float, seed: int, args: argparse.Namespace) -> Path:
    """Returns where a measurement is kept."""
    return args.out / f"{name.replace(', ', '-')}-g{guidance:g}-s{seed}.npz"


def measured(name: str, guidance: float, seed: int, args: argparse.Namespace, pipe: Any) -> Measured:
    """Returns the measurement of one setting, from the disk or made now."""
    path = saved_at(name, guidance, seed, args)
    if not path.exists():
        asks = asked(name, seed, args)
        found = measure(pipe(), draw(pipe(), asks, guidance=guidance, seed=seed), asks)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **vars(found))
        print(f"{name:14s} guidance {guidance:g} seed {seed}: {_line(found.accuracy(asks))}", flush=True)
    with np.load(path) as saved:
        return Measured(**saved)


def measure_all(names: Sequence[str], args: argparse.Namespace) -> None:
    """Makes the measurements that are missing."""
    for name in names:
        made: list[Any] = []

        def pipe(name: str = name, made: list[Any] = made) -> Any:
            if not made:
                made.append(prepared(name, args))
            return made[0]

        for guidance in args.guidance:
            for seed in range(args.seeds):
                measured(name, guidance, seed, args, pipe)


def picture(args: argparse.Namespace, each: int = 2, columns: int = 4) -> Image.Image:
    """Returns the first prompts of every skill, drawn from the same noise by the base and by the named adapters."""
    asks = [ask for row, ask in enumerate(prompts(args.per_skill, 0)) if row % args.per_skill < each]
    found = {}
    for name in ("base", *args.names):
        drawn = draw(prepared(name, args), [ask for ask in asks for _ in range(columns)], guidance=args.guidance[0])
        found[name] = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    return framed(found, asks)


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the Frechet distance of the normal distributions of two sets of features, (n, d) each."""
    spread, other = (np.cov(part, rowvar=False) for part in (first, second))
    values, vectors = np.linalg.eigh(spread)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ other @ root).clip(0)
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(spread + other) - 2 * np.sqrt(mixed).sum())


def results(names: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the figures of every adapter and guidance scale that has been measured for all seeds."""
    base = load_base(args.base)
    rng = np.random.default_rng(12345)
    real = features(base, [render(random_ask(rng).scene(rng), random_background(rng)) for _ in range(2000)])
    table: dict[str, dict[str, Any]] = {}
    correct: dict[tuple[str, str], np.ndarray] = {}
    for name in names:
        diagnostics = _diagnostics(args.adapters / name / "log.jsonl")
        for guidance in args.guidance:
            if not all(saved_at(name, guidance, seed, args).exists() for seed in range(args.seeds)):
                continue
            runs = [measured(name, guidance, seed, args, lambda: base) for seed in range(args.seeds)]
            asks = [asked(name, seed, args) for seed in range(args.seeds)]
            scores = [run.accuracy(some) for run, some in zip(runs, asks, strict=True)]
            table.setdefault(name, {})[f"{guidance:g}"] = {
                "accuracy": {key: _mean_and_error([score[key] for score in scores]) for key in scores[0]},
                "quality": _mean_and_error([float(run.quality.mean()) for run in runs]),
                "counted": _mean_and_error([float(run.counted.mean()) for run in runs]),
                "distance": frechet(np.concatenate([run.features for run in runs]), real),
                **diagnostics,
            }
            correct[name, f"{guidance:g}"] = np.concatenate([run.correct for run in runs])
    for (name, scale), found in correct.items():
        row = table[name][scale]
        for key, other in (("gain", scale), ("gain_at_best", best_scale(table.get("base", {}), scale))):
            if ("base", other) in correct and name != "base":
                row[key] = _mean_and_error(found.astype(float) - correct["base", other])
    return table


def best_scale(scales: Mapping[str, Any], otherwise: str | None = None) -> str | None:
    """Returns the guidance scale at which a row of the table has its highest total."""
    return max(scales, key=lambda scale: scales[scale]["accuracy"]["total"][0]) if scales else otherwise


def as_markdown(table: Mapping[str, Mapping[str, Any]], guidance: str | None = None) -> str:
    """Returns a table of all adapters at one guidance scale, or each at its own best."""
    headings = ["adapter", "guidance", *SKILLS, "**total**", "gain", "too many", "shape quality", "Frechet"]
    lines = ["| " + " | ".join([*headings, "top-1", "information"]) + " |", "| --- " * (len(headings) + 2) + "|"]
    for name, scales in table.items():
        scale = guidance or best_scale(scales)
        row = scales[scale]
        percent = {key: f"{100 * mean:.0f}" for key, (mean, _) in row["accuracy"].items()}
        cells = [name, scale, *(percent[skill] for skill in SKILLS)]
        cells.append("**{:.1f} ± {:.1f}**".format(*(100 * number for number in row["accuracy"]["total"])))
        gain = row.get("gain" if guidance else "gain_at_best")
        cells.append("{:+.1f} ± {:.1f}".format(*(100 * number for number in gain)) if gain else "")
        cells += [f"{row['counted'][0]:+.2f}", f"{row['quality'][0]:.3f}", f"{row['distance']:.2f}"]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("top1", "information")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def _diagnostics(log: Path) -> dict[str, float]:
    """Returns the last held-out figures of a training log, if there is one."""
    found: dict[str, float] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        found |= {key: entry[f"held_out/{key}"] for key in ("top1", "information") if f"held_out/{key}" in entry}
    return found


def _line(accuracy: Mapping[str, float]) -> str:
    return " ".join(f"{skill} {100 * value:.0f}" for skill, value in accuracy.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["all", "train", "measure", "table", "picture"], default="all")
    parser.add_argument("names", nargs="*", help="adapters; all unless given")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    parser.add_argument("--out", type=Path, default=Path("outputs/study"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--per-skill", type=int, default=30)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each adapter")
    args = parser.parse_args(arguments)
    names = args.names or [*VARIANTS, LORA]
    if args.part in ("all", "train"):
        for name in names:
            if name not in BASE_ROWS and not (args.adapters / name).exists():
                train(name, args.adapters, args.base, steps=args.steps)
    if args.part in ("all", "measure"):
        measure_all(args.names or [*BASE_ROWS, *names], args)
    if args.part == "picture":
        args.out.mkdir(parents=True, exist_ok=True)
        picture(args).quantize(128).save(args.out / "pictures.png", optimize=True)
    if args.part in ("all", "table"):
        table = results(args.names or [*BASE_ROWS, *names], args)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(table, indent=1) + "\n")
        text = "Each at its best guidance scale:\n\n" + as_markdown(table)
        for scale in args.guidance:
            here = {name: rows for name, rows in table.items() if f"{scale:g}" in rows}
            text += f"\n\nAll at guidance {scale:g}:\n\n" + as_markdown(here, f"{scale:g}")
        (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
