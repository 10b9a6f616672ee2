"""Trains an adapter of the shapes world: images, their captions, and written negatives.

    python -m shapes_world.train_adapter --out outputs/adapter
    python -m shapes_world.train_adapter --out outputs/lora --lora

Captions are true and in the everyday phrasings, as those of a user's own images would be. The first command trains
soft tokens by contrast with the settings of `RECIPE`; `adapter/` in this folder is its result. The second trains a
LoRA of as many numbers on the same images by plain denoising; `lora/` is its result.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from diffusers_softrepa import SoftREPAConfig
from diffusers_softrepa.conditioning import conditioner_of
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer
from shapes_world.drawing import BASE, as_input, load_base
from shapes_world.models import MAX_WORDS
from shapes_world.world import SIZE, random_ask, random_background, render

IMAGES, EVALUATED = 2000, 64
STEPS, BATCH, LEARNING_RATE = 300, 8, 3e-3
# Noise levels at which is decided what is drawn.
HIGH_NOISE: dict[str, Any] = {"min_timestep": 400.0, "config": {"num_timestep_bins": 10}}
# What differs from the trainer's defaults: linear logits, written negatives, the denoising error beside the contrast.
RECIPE: dict[str, Any] = {"logits": "linear", "temperature": 0.05, "denoising_weight": 50.0, "hard": 3, **HIGH_NOISE}
LORA_LEARNING_RATE = 1e-3
LORA_FILE = "pytorch_lora_weights.safetensors"


def pairs(count: int, seed: int, hard: int = 0) -> list[dict[str, Any]]:
    """Returns images with true captions and, for each, `hard` captions that are wrong in one thing."""
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


def train_tokens(
    pipe: Any,
    folder: Path,
    steps: int,
    rows: Sequence[dict[str, Any]],
    eval_rows: Sequence[dict[str, Any]],
    recipe: dict[str, Any] = RECIPE,
    **changes: Any,
) -> None:
    """Trains soft tokens on rows as `pairs` makes them; leaves no checkpoints behind.

    Args:
        pipe: The base.
        folder: Where the adapter is written.
        steps: Optimizer steps.
        rows: To learn from; with `negatives` where the recipe has `hard`.
        eval_rows: To measure on, after the last step unless `eval_steps` is among the changes.
        recipe: What differs from the trainer's defaults; `config` is that of the tokens.
        changes: The same, over the recipe.
    """
    settings = {"eval_steps": steps, **recipe, **changes}
    hard, config = settings.pop("hard", 0), settings.pop("config", {})
    negatives = {"negative_caption_column": "negatives"} if hard else {}
    arguments = trainer_arguments(folder, steps, **negatives, **settings)
    tokens = SoftREPAConfig.for_denoiser(pipe.transformer, **config)
    ContrastiveFlowMatchingTrainer(pipe, arguments, rows, eval_rows, adapter_config=tokens).train()
    for left in (*folder.glob("checkpoint-*"), folder / "best"):
        shutil.rmtree(left, ignore_errors=True)


def train_lora(pipe: Any, folder: Path, steps: int, rows: Sequence[dict[str, Any]], seed: int = 0) -> None:
    """Trains a LoRA on the attention of all blocks by plain denoising, with about as many numbers as the tokens."""
    tokens = SoftREPAConfig.for_denoiser(pipe.transformer).num_parameters
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]
    width, blocks = pipe.transformer.inner_dim, len(pipe.transformer.transformer_blocks)
    rank = max(1, round(tokens / (2 * width * blocks * len(targets))))
    torch.manual_seed(seed)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    weights = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LORA_LEARNING_RATE, weight_decay=1e-4)
    conditioner, rng = conditioner_of(pipe, max_sequence_length=MAX_WORDS), np.random.default_rng(seed)
    noising = conditioner.noising
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
    keep_settings(folder / LORA_FILE, {"r": rank, "lora_alpha": rank, "target_modules": targets})


def keep_settings(file: Path, settings: dict[str, Any]) -> None:
    """Leaves only these settings in a LoRA's file: an older peft refuses the names of those that it does not know."""
    settings = {"rank_pattern": {}, "alpha_pattern": {}} | settings  # diffusers wants to read these
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    save_file(load_file(file), file, metadata)


def load_lora(pipe: Any, folder: Path) -> None:
    """Loads what `train_lora` wrote, by diffusers' own call."""
    pipe.transformer.load_lora_adapter(str(folder), prefix=None, weight_name=LORA_FILE, use_safetensors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--base", type=Path, default=BASE, help="folder of the pipeline")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true", help="a LoRA by plain denoising instead of soft tokens")
    given = parser.parse_args(arguments)
    pipe = load_base(given.base)
    if given.lora:
        train_lora(pipe, given.out, given.steps, pairs(IMAGES, given.seed + 10), given.seed)
    else:
        rows, eval_rows = pairs(IMAGES, given.seed + 10, RECIPE["hard"]), pairs(EVALUATED, 9)
        train_tokens(pipe, given.out, given.steps, rows, eval_rows, seed=given.seed)


if __name__ == "__main__":
    main()
