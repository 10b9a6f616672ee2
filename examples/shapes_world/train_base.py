"""Trains the base pipelines of the shapes world from scratch.

    python examples/shapes_world/train_base.py vae --out outputs/base
    python examples/shapes_world/train_base.py sd3 --out outputs/base
    python examples/shapes_world/train_base.py sd --out outputs/base

First the autoencoder, then a denoiser with its text encoders: Stable Diffusion 3 by flow matching, or Stable
Diffusion, a UNet that predicts noise. Each goes on from its last checkpoint when it was interrupted. `log.jsonl` keeps
the losses, `vae/`, `sd3/` and `sd/` what was trained, in the layout of diffusers.

The denoiser learns in two stages. In the first all captions are exact. In the second they are as those of the web:
a third are exact still, and tagged as such; half of the others leave out something that the picture shows, so the
model draws things that nobody asked for. The text encoders learn in the first stage alone and are frozen from then on,
as those of large models are. With `--untagged`, as many captions leave something out, but no tag tells which.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional
from world import SKILLS, Ask, Thing, random_ask, random_background, render, with_another

NARROWER = 0.1  # than the divergence asks for is the noise with which the decoder learns
SCENES = 60_000  # pictures that the denoiser learns from
# How often the denoiser sees each skill: what has to be learned about several things, more.
SKILL_SHARES = dict(zip(SKILLS, (0.06, 0.12, 0.20, 0.08, 0.20, 0.17, 0.17), strict=True))
NO_CAPTION = 0.10  # share of empty captions, for classifier-free guidance
TRUE_STAGE = 0.75  # share of the steps, at the beginning, in which captions are true
TAGGED = 1 / 3  # Then the share of captions that are tagged, and exact;
LEFT_OUT = 0.5  # how many of the others leave out something that their picture shows.
DROPPED = 0.464  # how often each text encoder is left out then, as Stable Diffusion 3 was trained (arXiv 2403.03206)
NOISE_MEAN = 0.4  # of the logit of the noise level; what is drawn where is decided at high noise
# How long the T5 part of the text is in training: all words fit, but pipelines that are told nothing pad it to 256.
T5_LENGTHS, T5_SHARES = (models.MAX_WORDS, 64, 256), (0.94, 0.04, 0.02)

Scene = tuple[Ask, list[Thing], float]  # what may be said, the things of which it is true, the shade behind them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["vae", "sd3", "sd"])
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, log and results")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 1000 for vae, 8000 for the others)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--untagged", action="store_true", help="as many captions leave out, but no tag tells which")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    train_vae(args) if args.part == "vae" else train_pipeline(args)


def scenes(count: int, seed: int, shares: Mapping[str, float] | None = None, *, free: bool = False) -> Iterator[Scene]:
    """Draws scenes: what may be said, the things of which it is true, and a shade of background.

    Args:
        count: How many.
        seed: Of the random numbers.
        shares: How often each skill comes; all as often unless told.
        free: As in `Ask.scene`.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        skill = None if shares is None else str(rng.choice(list(shares), p=list(shares.values())))
        ask = random_ask(rng, skill)
        yield ask, ask.scene(rng, free=free), random_background(rng)


def pictures(drawn: Iterable[Scene]) -> Tensor:
    """Returns the pixels of scenes, (scenes, 3, 32, 32) uint8."""
    pixels = np.stack([np.asarray(render(things, shade)) for _, things, shade in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def as_input(pixels: Tensor) -> Tensor:
    """Returns pixels (n, 3, 32, 32) uint8 as the autoencoder reads them, in -1..1."""
    return pixels.float() / 127.5 - 1


def train_vae(args: argparse.Namespace) -> None:
    """Learns to compress: absolute error, a faint Kullback-Leibler term; then measures mean and spread of latents."""
    steps = args.steps or 1000
    vae = models.vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=0.0)
    run = Run(args, "vae", {"model": vae, "optimizer": optimizer})
    pixels = pictures(scenes(8192, args.seed + 1, free=True))  # more than it will see: it must not be the limit
    for step in run.steps(steps, optimizer):
        batch = as_input(pixels[torch.from_numpy(run.rng(step).integers(len(pixels), size=args.batch_size // 2))])
        posterior = vae.encode(batch).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.std) * NARROWER
        decoded = vae.decode(latents).sample
        error = (decoded - batch).abs().mean() + (decoded - batch).square().mean()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        run.optimize(error + 1e-4 * divergence, [vae], error=error.item(), divergence=divergence.item())
    narrow(vae)
    with torch.no_grad():
        latents = torch.cat([vae.encode(as_input(part)).latent_dist.mode() for part in pixels[:2048].split(256)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    vae.save_pretrained(args.out / "vae")


@torch.no_grad()
def narrow(vae: AutoencoderKL) -> None:
    """Writes into the encoder how narrow a posterior the decoder has learned from, so that its samples can be used."""
    vae.encoder.conv_out.bias[models.LATENT_CHANNELS :] += 2 * math.log(NARROWER)  # of the logarithms of variances


def train_pipeline(args: argparse.Namespace) -> None:
    """Learns to draw what captions say, with an average of the weights."""
    steps = args.steps or 8000
    vae = AutoencoderKL.from_pretrained(args.out / "vae").requires_grad_(False)
    vae.register_to_config(_name_or_path="vae")  # not a path of this machine
    make, loss_of = {"sd3": (models.sd3_pipeline, flow_loss), "sd": (models.sd_pipeline, noise_loss)}[args.part]
    pipe = make(vae)
    pipe.set_progress_bar_config(disable=True)
    parts = models.trained_parts(pipe).train()
    average = copy.deepcopy(parts).requires_grad_(False)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(args, args.part, {"model": parts, "average": average, "optimizer": optimizer})
    latents, said = encoded_pictures(args, vae)
    shares = (0.0, LEFT_OUT * (1 - TAGGED)) if args.untagged else (TAGGED, LEFT_OUT)
    for step in run.steps(steps, optimizer):
        rng = run.rng(step)
        rows = rng.integers(len(said), size=args.batch_size)
        late = step >= TRUE_STAGE * steps
        parts[1:].requires_grad_(not late)  # the text encoders learn with the denoiser first, then stay as they are
        captions, more = zip(
            *(caption(said[row], rng, *(shares if late else (0.0, 0.0))) for row in rows), strict=True
        )
        shown = latents[torch.tensor(more).long(), torch.from_numpy(rows)].float()
        loss = loss_of(pipe, shown, list(captions), rng, DROPPED if late else 0.0)
        run.optimize(loss, [parts])
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), parts.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
    parts.load_state_dict(average.state_dict())
    pipe.to(torch.float16)
    pipe.save_pretrained(args.out / args.part)


def flow_loss(
    pipe: StableDiffusion3Pipeline, clean: Tensor, captions: list[str], rng: np.random.Generator, dropped: float = 0.0
) -> Tensor:
    """Flow matching at logit-normal noise levels; latents are (n, 8, 8, 8), each text encoder is at times left out."""
    length = int(rng.choice(T5_LENGTHS, p=T5_SHARES))
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
    sigma = torch.sigmoid(NOISE_MEAN + torch.from_numpy(rng.standard_normal(len(clean), dtype=np.float32)))
    share = sigma.view(-1, 1, 1, 1)
    embeds, pooled = models.encode(pipe, captions, length)
    if dropped:
        embeds, pooled = without(embeds, pooled, torch.from_numpy(rng.random((len(clean), 3)) < dropped))
    velocity = pipe.transformer(
        hidden_states=(1 - share) * clean + share * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return functional.mse_loss(velocity, noise - clean)


def without(embeds: Tensor, pooled: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Returns text states, (n, text, D) and (n, D), with zeros where an encoder is left out, `dropped` (n, 3) bool."""
    half, words = pooled.shape[-1] // 2, models.MAX_WORDS
    kept = (~dropped).float()
    clip = kept[:, :2].repeat_interleave(half, 1)  # (n, D): the two CLIP encoders share the channels
    shown = torch.cat([clip[:, None].expand(-1, words, -1), kept[:, 2:, None].expand_as(embeds[:, words:])], 1)
    return embeds * shown, pooled * clip


def noise_loss(
    pipe: StableDiffusionPipeline, clean: Tensor, captions: list[str], rng: np.random.Generator, dropped: float = 0.0
) -> Tensor:
    """Prediction of the noise at timesteps of which high ones come more often; latents are (n, 8, 8, 8).

    The only text encoder is never left out.
    """
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
    timestep = torch.from_numpy((1000 * np.sqrt(rng.random(len(clean)))).astype(np.int64))
    embeds, _ = pipe.encode_prompt(captions, clean.device, 1, False)
    noisy = pipe.scheduler.add_noise(clean, noise, timestep)
    return functional.mse_loss(pipe.unet(noisy, timestep, embeds, return_dict=False)[0], noise)


def caption(ask: Ask, rng: np.random.Generator, tagged: float, left_out: float) -> tuple[str, bool]:
    """Draws a caption, empty or tagged at times, and whether the picture shows something that it leaves out."""
    empty, exact, more = rng.random() < NO_CAPTION, rng.random() < tagged, rng.random() < left_out
    ask = ask.rephrased(rng)
    ask = ask.tagged() if exact else ask
    return "" if empty else ask.caption, more and not exact


def encoded_pictures(args: argparse.Namespace, vae: AutoencoderKL) -> tuple[Tensor, list[Ask]]:
    """Returns normalised latents, (2, SCENES, 8, 8, 8) half precision, and what may be said of them; kept on disk.

    The first of the two pictures of a scene shows what may be said, the second one thing more.

    Raises:
        ValueError: The latents on disk are of other scenes, because the world has changed since.
    """
    path, drawn = args.out / "latents.pt", list(scenes(SCENES, args.seed + 2, SKILL_SHARES))
    said = [ask for ask, _, _ in drawn]
    captions = [ask.caption for ask in said]
    if not path.exists():
        rng = np.random.default_rng(args.seed + 3)
        more = [(ask, with_another(things, rng), shade) for ask, things, shade in drawn]
        with torch.no_grad():
            modes = [
                vae.encode(as_input(part)).latent_dist.mode()
                for some in (drawn, more)
                for part in pictures(some).split(256)
            ]
        latents = (torch.cat(modes).unflatten(0, (2, -1)) - vae.config.shift_factor) * vae.config.scaling_factor
        torch.save({"latents": latents.half(), "captions": captions}, path)
    saved = torch.load(path)
    if saved["captions"] != captions or len(saved["latents"]) != 2:
        raise ValueError(f"the pictures of {path} do not belong to these captions; remove the file, and start anew")
    return saved["latents"], said


class Run:
    """The steps of one training: learning rate, checkpoints, log."""

    WARM_UP, COOL_DOWN = 100, 0.3  # steps; share of steps

    def __init__(self, args: argparse.Namespace, name: str, state: dict[str, Any]) -> None:
        self._args, self._name, self._state = args, name, state
        self._path = args.out / f"{name}.checkpoint.pt"
        self._done, self._step, self._losses = 0, 0, []
        self._optimizer: Any = None
        self._more: dict[str, float] = {}
        if self._path.exists():
            saved = torch.load(self._path)
            for key, value in state.items():
                value.load_state_dict(saved[key])
            self._done = saved["step"]

    def rng(self, step: int) -> np.random.Generator:
        """Random numbers of one step, the same when it is repeated."""
        return np.random.default_rng((self._args.seed, step))

    def steps(self, steps: int, optimizer: Any) -> Any:
        """Counts the steps that are left."""
        self._optimizer, began = optimizer, time.perf_counter()
        for step in range(self._done, steps):
            self._step = step
            torch.manual_seed(self._args.seed + 1000 * step)
            rate = min(1, (step + 1) / self.WARM_UP, (steps - step) / (self.COOL_DOWN * steps))
            for group in optimizer.param_groups:
                group["lr"] = self._args.learning_rate * rate
            yield step
            if (step + 1) % 50 == 0:  # the mean of 50 steps
                entry = {"part": self._name, "step": step + 1, "loss": float(np.mean(self._losses))}
                entry |= {"learning_rate": self._args.learning_rate * rate, "seconds": time.perf_counter() - began}
                with open(self._args.out / "log.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps(entry | self._more) + "\n")
                print(entry | self._more, flush=True)
                self._losses.clear()
            if (step + 1) % self._args.checkpoint_every == 0:
                self._save(step + 1)

    def optimize(self, loss: Tensor, models: list[nn.Module], **more: float) -> None:
        """One optimizer step."""
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of step {self._step} is {loss.item()}; lower --learning-rate")
        self._losses.append(loss.item())
        self._more = more
        loss.backward()
        nn.utils.clip_grad_norm_([p for model in models for p in model.parameters()], 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _save(self, step: int) -> None:
        saved = {key: value.state_dict() for key, value in self._state.items()} | {"step": step}
        torch.save(saved, self._path.with_suffix(".new"))
        self._path.with_suffix(".new").replace(self._path)


if __name__ == "__main__":
    main()
