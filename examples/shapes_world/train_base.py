"""Trains the embedded pipeline of the shapes world from scratch.

    python -m shapes_world.train_base --out outputs/base
    torchrun --nproc-per-node 2 -m shapes_world.train_base --out outputs/base    # the same on two cores

First the autoencoder, then Stable Diffusion 3 with its text encoders, by flow matching, in two stages. In the first
all captions are exact, in three phrasings. In the second, captions are as unreliable as those that large models learn
from, and how reliable they are shows in how they are written: four in ten are in one phrasing ("there is ...", "there
are ...") and exact, as written descriptions are; the others are in the two everyday phrasings and often wrong, as
alternative texts of web pages are. What the denoiser learns is to follow a caption exactly if it is written like a
description, and loosely if it is not. The text encoders learn with the denoiser in the first stage and are frozen from
then on. Captions whose phrasing says nothing would teach them to ignore it, so the loss rises where it explains too
little of what they make of the words. With `--start` the second stage alone is trained, from a
pipeline that has the first behind it.

Everything goes on from its last checkpoint when it was interrupted. `log.jsonl` keeps the losses and, while the second
stage runs, how many images the oracle finds right in either phrasing; `vae/` and `sd3/` are what was trained, in the
layout of diffusers.
"""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional

from shapes_world import models
from shapes_world.drawing import draw, measure
from shapes_world.world import EVERYDAY, EXACT, SKILLS, Ask, Thing, prompts, random_ask, random_background, render

NARROWER = 0.1  # than the divergence asks for is the noise with which the decoder learns
SCENES = 60_000  # images that the denoiser learns from
# How often the denoiser sees each skill: what has to be learned about several things, more.
SKILL_SHARES = dict(zip(SKILLS, (0.06, 0.12, 0.20, 0.08, 0.20, 0.17, 0.17), strict=True))
NO_CAPTION = 0.10  # share of empty captions, for classifier-free guidance
EXACT_STEPS = 0.5  # share of the steps, at the beginning, in which all captions are exact and the encoders learn
# While the text encoders learn: the share of the variance of their outputs that the phrasing must explain, and the
# weight of what it lacks in the loss.
PHRASING_SHARE, PHRASING_WEIGHT = 0.05, 0.1
# Share of a stage's steps in which the learning rate falls to zero.
COOL_DOWN_EXACT, COOL_DOWN_MIXED = 0.3, 0.7
# Of the captions that are not empty, in the second stage: in the exact phrasing and true, or in an everyday one and
# true, false in one thing, or the caption of another image.
MIXTURE = {"exact": 0.40, "true": 0.18, "false": 0.27, "another": 0.15}
WARM_UP = 100  # steps at the beginning of a stage, in which the learning rate rises
NOISE_MEAN = 0.4  # of the logit of the noise level; what is drawn where is decided at high noise
# How long the T5 part of the text is in training: all words fit, but pipelines that are told nothing pad it to 256.
T5_LENGTHS, T5_SHARES = (models.MAX_WORDS, 64, 256), (0.96, 0.03, 0.01)
PROBES = 20  # prompts of each skill that are drawn in either phrasing, every `PROBE_EVERY` steps of the second stage
PROBE_EVERY, PROBE_GUIDANCE = 500, 2.0

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them

Scene = tuple[Ask, list[Thing], float]  # what may be said, the things of which it is true, the shade behind them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, log and results")
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=14_000, help="optimizer steps of both stages")
    parser.add_argument(
        "--start", type=Path, help="pipeline that has the first stage behind it; its weights and autoencoder go on"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--vae-learning-rate", type=float, default=2e-3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.start is None and not (args.out / "vae").exists():
        if PROCESSES > 1:
            raise ValueError("the autoencoder is trained by one process; run the command once without torchrun")
        train_vae(args)
    if PROCESSES > 1:
        dist.init_process_group("gloo")
    train_pipeline(args)


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


def images(drawn: Iterable[Scene]) -> Tensor:
    """Returns the pixels of scenes, (scenes, 3, 32, 32) uint8."""
    pixels = np.stack([np.asarray(render(things, shade)) for _, things, shade in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def as_input(pixels: Tensor) -> Tensor:
    """Returns pixels (n, 3, 32, 32) uint8 as the autoencoder reads them, in -1..1."""
    return pixels.float() / 127.5 - 1


def train_vae(args: argparse.Namespace) -> None:
    """Learns to compress: absolute error, a faint Kullback-Leibler term; then measures mean and spread of latents."""
    vae = models.vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, weight_decay=0.0)
    run = Run(args, "vae", {"model": vae, "optimizer": optimizer})
    pixels = images(scenes(8192, args.seed + 1, free=True))  # more than it will see: it must not be the limit
    for step in run.steps([Stage(args.vae_steps, COOL_DOWN_EXACT)], optimizer):
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
    vae = AutoencoderKL.from_pretrained((args.start or args.out) / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False)
    vae.register_to_config(_name_or_path="vae")  # not a path of this machine
    pipe = models.sd3_pipeline(vae)
    if args.start is not None:
        known = StableDiffusion3Pipeline.from_pretrained(args.start, dtype=torch.float32)
        models.trained_parts(pipe).load_state_dict(models.trained_parts(known).state_dict())
    pipe.set_progress_bar_config(disable=True)
    parts = models.trained_parts(pipe).train()
    average = copy.deepcopy(parts).requires_grad_(False)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(args, "sd3", {"model": parts, "average": average, "optimizer": optimizer})
    latents, drawn = encoded_images(args, vae)
    exact = 0 if args.start is not None else round(EXACT_STEPS * args.steps)
    texts: dict[str, tuple[Tensor, Tensor]] = {}
    stages = [Stage(exact, COOL_DOWN_EXACT), Stage(args.steps - exact, COOL_DOWN_MIXED)]
    for step in run.steps(stages, optimizer):
        rng = run.rng(step)
        rows = rng.integers(len(drawn), size=args.batch_size)
        mixed = step >= exact
        parts[1:].requires_grad_(not mixed)
        captions = [caption(drawn[row], drawn[rng.integers(len(drawn))][0], rng, mixed=mixed) for row in rows]
        length = int(rng.choice(T5_LENGTHS, p=T5_SHARES))
        noise = rng.standard_normal((len(rows), *latents.shape[1:]), dtype=np.float32)
        logit = NOISE_MEAN + rng.standard_normal(len(rows), dtype=np.float32)
        # Each process takes its share of the batch that one process would have.
        rows, captions, noise, logit = (drawn_now[RANK::PROCESSES] for drawn_now in (rows, captions, noise, logit))
        if mixed and length == models.MAX_WORDS:
            text = encoded_once(pipe, captions, texts)
        else:
            text = models.encode(pipe, captions, length)
        noisy = torch.from_numpy(noise), torch.sigmoid(torch.from_numpy(logit))
        loss = flow_loss(pipe, latents[torch.from_numpy(rows)].float(), *text, *noisy)
        lacking = 0.0 if mixed else functional.relu(1 - phrasing_share(captions, text[0]) / PHRASING_SHARE)
        run.optimize(loss + PHRASING_WEIGHT * lacking, [parts])
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), parts.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        if mixed and RANK == 0 and (step + 1) % PROBE_EVERY == 0:
            run.log(**probe(pipe, parts, average))
    if RANK == 0:
        parts.load_state_dict(average.state_dict())
        pipe.to(torch.float16)
        models.save_pipeline(pipe, args.out / "sd3")


def flow_loss(
    pipe: StableDiffusion3Pipeline, clean: Tensor, embeds: Tensor, pooled: Tensor, noise: Tensor, sigma: Tensor
) -> Tensor:
    """Flow matching; latents and noise are (n, 8, 8, 8), texts (n, text, D) and (n, D), noise levels (n,) in 0..1."""
    share = sigma.view(-1, 1, 1, 1)
    velocity = pipe.transformer(
        hidden_states=(1 - share) * clean + share * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return functional.mse_loss(velocity, noise - clean)


def phrasing_share(captions: list[str], embeds: Tensor) -> Tensor:
    """Returns the share of the variance of what the transformer reads that the phrasing explains, exact or everyday.

    What it reads of a caption as a whole is not asked: soft tokens stand among the words, so they can bring out only
    what the words tell. The captions of all processes are taken together.

    Args:
        captions: The captions of this process.
        embeds: What the transformer reads of their words, (n, text, D); the mean over the text is taken.
    """
    exact = torch.tensor([text.startswith("there ") for text in captions])
    read = embeds.mean(1)
    if PROCESSES > 1:
        exact, read = (torch.cat(all_gather(part)) for part in (exact, read))
    read = read - read.mean(0)
    groups = [read[chosen] for chosen in (exact, ~exact) if chosen.any()]
    between = sum(len(group) * group.mean(0).square().sum() for group in groups)
    return between / read.square().sum()


def caption(scene: Scene, other: Ask, rng: np.random.Generator, *, mixed: bool) -> str:
    """Draws a caption of a scene: empty at times, exact in any phrasing, or as `MIXTURE` says."""
    ask, things, _ = scene
    if rng.random() < NO_CAPTION:
        return ""
    if not mixed:
        return ask.rephrased(rng, (*EVERYDAY, *EXACT)).caption
    kind = rng.choice(list(MIXTURE), p=list(MIXTURE.values()))
    if kind == "exact":
        return ask.rephrased(rng, EXACT).caption
    if kind == "false":
        ask = ask.false_of(things, rng) or ask
    elif kind == "another":
        ask = other
    return ask.rephrased(rng, EVERYDAY).caption


@torch.no_grad()
def encoded_once(
    pipe: StableDiffusion3Pipeline, captions: list[str], known: dict[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns what the transformer reads of captions, as `models.encode`; encodes those that are not `known` yet."""
    if new := sorted({text for text in captions if text not in known}):
        known |= dict(zip(new, zip(*models.encode(pipe, new), strict=True), strict=True))
    embeds, pooled = zip(*(known[text] for text in captions), strict=True)
    return torch.stack(embeds), torch.stack(pooled)


@torch.no_grad()
def probe(pipe: StableDiffusion3Pipeline, parts: nn.ModuleList, average: nn.ModuleList) -> dict[str, float]:
    """Returns the share of right images that the averaged weights draw in either phrasing."""
    now = copy.deepcopy(parts.state_dict())
    parts.load_state_dict(average.state_dict())
    parts.eval()
    asks = prompts(PROBES, 1)
    found = {}
    for name, said in (("everyday", asks), ("exact", [ask.exactly() for ask in asks])):
        drawn = draw(pipe, said, guidance=PROBE_GUIDANCE)
        found[name] = measure(pipe, drawn, said).accuracy(said)["total"]
    parts.load_state_dict(now)
    parts.train()
    return found


def encoded_images(args: argparse.Namespace, vae: AutoencoderKL) -> tuple[Tensor, list[Scene]]:
    """Returns normalised latents, (SCENES, 8, 8, 8) half precision, and their scenes; latents are kept on disk.

    Raises:
        ValueError: The latents on disk are of other scenes, because the world has changed since.
    """
    path, drawn = args.out / "latents.pt", list(scenes(SCENES, args.seed + 2, SKILL_SHARES))
    captions = [ask.caption for ask, _, _ in drawn]
    if not path.exists():
        with torch.no_grad():
            modes = [vae.encode(as_input(part)).latent_dist.mode() for part in images(drawn).split(256)]
        latents = (torch.cat(modes) - vae.config.shift_factor) * vae.config.scaling_factor
        torch.save({"latents": latents.half(), "captions": captions}, path)
    saved = torch.load(path)
    if saved["captions"] != captions:
        raise ValueError(f"the images of {path} do not belong to these captions; remove the file, and start anew")
    return saved["latents"], drawn


def averaged(gradients: list[Tensor]) -> None:
    """Gives every process the mean of all processes' gradients, in place."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient) / PROCESSES)


@dataclass(frozen=True)
class Stage:
    """Steps with a learning rate that rises, stays and falls to zero.

    Attributes:
        steps: How many.
        cool_down: Share of them, at the end, in which it falls.
    """

    steps: int
    cool_down: float

    def rate(self, step: int) -> float:
        """Returns the share of the full learning rate at a step of this stage."""
        return min(1, (step + 1) / WARM_UP, (self.steps - step) / (self.cool_down * self.steps))


class Run:
    """The steps of one training: learning rate, checkpoints, log."""

    def __init__(self, args: argparse.Namespace, name: str, state: dict[str, Any]) -> None:
        self._args, self._name, self._state = args, name, state
        self._path = args.out / f"{name}.checkpoint.pt"
        self._done, self._step, self._losses = 0, 0, []
        self._optimizer: Any = None
        self._rate = 0.0
        self._more: dict[str, float] = {}
        if self._path.exists():
            saved = torch.load(self._path)
            for key, value in state.items():
                value.load_state_dict(saved[key])
            self._done = saved["step"]

    def rng(self, step: int) -> np.random.Generator:
        """Random numbers of one step, the same when it is repeated."""
        return np.random.default_rng((self._args.seed, step))

    def steps(self, stages: Iterable[Stage], optimizer: Any) -> Iterator[int]:
        """Counts the steps that are left of all stages."""
        self._optimizer, self._rate, began = optimizer, optimizer.defaults["lr"], time.perf_counter()
        rates = [stage.rate(step) for stage in stages for step in range(stage.steps)]
        for step, rate in enumerate(rates[self._done :], self._done):
            self._step = step
            torch.manual_seed(self._args.seed + 1000 * step)
            for group in optimizer.param_groups:
                group["lr"] = self._rate * rate
            yield step
            if (step + 1) % 50 == 0:  # the mean of 50 steps
                seconds = round(time.perf_counter() - began, 1)
                self.log(loss=float(np.mean(self._losses)), learning_rate=self._rate * rate, seconds=seconds)
                self._losses.clear()
            if (step + 1) % self._args.checkpoint_every == 0:
                self._save(step + 1)

    def log(self, **figures: float) -> None:
        """Adds a line to the log."""
        if RANK:
            return
        line = json.dumps({"part": self._name, "step": self._step + 1, **figures, **self._more})
        with open(self._args.out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(line + "\n")
        print(line, flush=True)

    def optimize(self, loss: Tensor, models: list[nn.Module], **more: float) -> None:
        """One optimizer step."""
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of step {self._step} is {loss.item()}; lower --learning-rate")
        self._losses.append(loss.item())
        self._more = more
        loss.backward()
        if PROCESSES > 1:
            averaged([p.grad for model in models for p in model.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_([p for model in models for p in model.parameters()], 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _save(self, step: int) -> None:
        if RANK:
            return
        saved = {key: value.state_dict() for key, value in self._state.items()} | {"step": step}
        torch.save(saved, self._path.with_suffix(".new"))
        self._path.with_suffix(".new").replace(self._path)


if __name__ == "__main__":
    main()
