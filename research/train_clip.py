"""Trains the CLIP of the shapes world from scratch: clean images and their true captions, in the usual way.

    python research/train_clip.py --out outputs/clip

Every caption of a batch is a negative of every other image, and no caption is written to be wrong: that is how CLIP
models learn, and why they see less in a caption than is there. The batch is small because the world is: as in a large
world, a caption seldom meets one that differs from it in a single thing. (With as many captions in batches of 128,
`--batch-size 128 --steps 1500`, it learns which attribute belongs to which thing.) `clip/` in the folder holds model,
tokenizer and image processor, as `diffusers_softrepa.evaluation.CLIPScore` loads them; `log.jsonl` keeps the losses.
An interrupted training goes on from its last checkpoint.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from shapes_world import models
from shapes_world.train_base import Run, as_input, images, scenes
from shapes_world.world import SIZE, Ask

SCENES = 30_000  # images to learn from
EVALUATED = 1024  # and to measure on
MAX_LOGIT_SCALE = math.log(100)
_HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}  # pixels of 0..1 become -1..1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log and result")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps (default: 6000)")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"images to learn from (default: {SCENES})")
    parser.add_argument("--batch-size", type=int, default=32, help="images and captions to match (default: 32)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    train(args)


def clip(words: CLIPTokenizer, *, width: int = 96, text_width: int = 64, patch: int = 8) -> CLIPModel:
    """An untrained CLIP of 32 x 32 pixels and the sentences of the world."""
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=3,
        num_attention_heads=text_width // 32,
        max_position_embeddings=models.MAX_WORDS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=text_width))


def processor() -> CLIPImageProcessorPil:
    """What makes pixels of images, as `train_base.as_input` does."""
    side = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size=side, crop_size=side, image_mean=_HALVES["mean"], image_std=_HALVES["std"])


def train(args: argparse.Namespace) -> None:
    """Learns to tell which caption of a batch belongs to which image."""
    words = models.clip_tokenizer()
    model = clip(words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    run = Run(args, "clip", {"model": model, "optimizer": optimizer})
    drawn = list(scenes(args.scenes, args.seed + 1))
    pixels, said = images(drawn), [ask for ask, _, _ in drawn]
    for step in run.steps(args.steps, optimizer):
        rng = run.rng(step)
        rows = rng.integers(len(said), size=args.batch_size)
        run.optimize(loss(model, words, pixels[torch.from_numpy(rows)], [said[row] for row in rows], rng), [model])
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    print({"evaluated": evaluated(model.eval(), words, args)}, flush=True)
    save(model, words, args.out / "clip")


def loss(
    model: CLIPModel, words: CLIPTokenizer, pixels: Tensor, said: Sequence[Ask], rng: np.random.Generator
) -> Tensor:
    """The mean of the cross entropies of images given captions and captions given images.

    Args:
        model: The CLIP.
        words: Its tokenizer.
        pixels: Images, (n, 3, 32, 32) uint8.
        said: What may be said of each; the phrasing is drawn.
        rng: Random numbers.
    """
    captions = [ask.rephrased(rng).caption for ask in said]
    return model(
        **words(captions, padding=True, return_tensors="pt"), pixel_values=as_input(pixels), return_loss=True
    ).loss


@torch.no_grad()
def evaluated(model: CLIPModel, words: CLIPTokenizer, args: argparse.Namespace) -> float:
    """Returns the mean loss of batches of images it has not seen."""
    drawn, rng = list(scenes(EVALUATED, args.seed + 2)), np.random.default_rng(args.seed)
    pixels, said = images(drawn), [ask for ask, _, _ in drawn]
    starts = range(0, EVALUATED, args.batch_size)
    losses = [
        loss(model, words, pixels[at : at + args.batch_size], said[at : at + args.batch_size], rng) for at in starts
    ]
    return float(torch.stack(losses).mean())


def save(model: CLIPModel, words: CLIPTokenizer, folder: Path) -> None:
    """Saves everything that `CLIPScore` loads: weights in half precision, to be computed with in single."""
    model.to(torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    words.save_pretrained(folder)
    processor().save_pretrained(folder)


if __name__ == "__main__":
    main()
