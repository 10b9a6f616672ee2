"""The main job, step by step: the authors' published SD3 adapter, from their files into a diffusers pipeline.

    python examples/published_adapter.py [--published FOLDER]

The adapter is the published one where `--published` or $SOFTREPA_PUBLISHED_SD3 names the folder of its two files, and
a stand-in in the same file layout where neither does. The pipeline is diffusers' own StableDiffusion3Pipeline at SD3's
real widths, with a quarter of its blocks and random weights: what is shown is the mechanics, on the real numbers.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import diffusers_softrepa  # noqa: F401  (gives pipelines the verbs)
from diffusers_softrepa import convert
from shapes_world import tokenizer_files

CAPTIONS = (
    "two giraffes standing next to a wooden fence in the grass",
    "a red double decker bus parked beside three yellow taxis",
    "a man in a blue shirt holding a slice of pizza to the left of a dog",
)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"


@dataclass(frozen=True)
class Drawing:
    """The result of one call of the pipeline.

    Attributes:
        image: The decoded image.
        latents: What it was decoded from, `(1, 16, height / 8, width / 8)`.
        step_seconds: Time from the end of one step to the end of the next.
    """

    image: Image.Image
    latents: Tensor
    step_seconds: list[float]


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    output, captions = Path(given.output), CAPTIONS[: given.captions]
    started = time.perf_counter()

    print("1. The authors' files")
    folder = convert_published(given.published, output)

    print("2. A StableDiffusion3Pipeline of SD3's widths, random weights")
    pipe = make_pipeline(given.blocks)
    count = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    print(f"   {len(pipe.transformer.transformer_blocks)} of SD3's 24 blocks, {count / 1e6:.0f} million parameters")

    def draw(caption: str, *, steps: int = given.steps) -> Drawing:
        return _draw(pipe, caption, seed=CAPTIONS.index(caption), steps=steps, size=given.size)

    print(f"3. Images of the base model: {len(captions)} captions, {given.steps} steps, guidance 4")
    base = [draw(caption) for caption in captions]

    print("4. The same seeds with the adapter: pipe.load_softrepa(folder)")
    pipe.load_softrepa(folder)
    _describe(pipe)
    adapted = [draw(caption) for caption in captions]
    for caption, one, other in zip(captions, base, adapted, strict=True):
        print(f"   {_distance(other, one):.4f} relative change of the latents: {caption}")
    _claim("the adapter changes every image", all(map(_differ, base, adapted)))

    print("5. Off and on again: pipe.disable_softrepa(), pipe.enable_softrepa()")
    switch_off_and_on(pipe, draw, dict(zip(captions, zip(base, adapted, strict=True), strict=True)))

    print('6. Steered: pipe.set_softrepa("softrepa", weight), change from the base after one step')
    sweep(pipe, lambda: draw(captions[0], steps=1))

    print("7. Saved by the pipeline, unloaded, loaded again")
    pipe.save_softrepa(output / "saved-by-the-pipeline")
    pipe.unload_softrepa()
    pipe.load_softrepa(output / "saved-by-the-pipeline")
    _claim("the image is the one before saving, to the last bit", not _differ(draw(captions[0]), adapted[0]))

    path = output / "grid.png"
    save_grid(path, captions, base, adapted)
    print(f"Images: {path}")
    print("With random weights they are noise, and attention that was never trained hardly notices four tokens: this")
    print(
        "shows the mechanics on the real numbers, not better alignment; examples/demo.py runs on a trained pipeline."
    )
    print(f"Done in {time.perf_counter() - started:.0f} s.")


def convert_published(published: str | None, output: Path) -> Path:
    """Converts the authors' files, or random ones if there are none, and returns the folder of the adapter."""
    source = Path(published) if published else write_stand_in(output / "stand-in")
    kind = "the published SD3 adapter" if published else "NOT the published adapter but random numbers in its shapes"
    print(f"   {source}: {kind}. Converted without running any pickle code:")
    folder = output / "sd3-adapter"
    base_model = "stabilityai/stable-diffusion-3-medium-diffusers"
    convert.main([str(source), str(folder), "--family", "sd3", "--base-model", base_model])
    return folder


def write_stand_in(folder: Path) -> Path:
    """Writes random numbers in the shapes and the file layout of the published SD3 adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    torch.save(nn.Parameter(0.1 * torch.randn(5, 4, 1536, generator=generator)), folder / convert.TOKENS_FILE)
    table = nn.Embedding.from_pretrained(0.1 * torch.randn(100, 5 * 1536, generator=generator), freeze=False)
    torch.save(table, folder / convert.TIMESTEP_TOKENS_FILE)
    return folder


def make_pipeline(num_blocks: int) -> StableDiffusion3Pipeline:
    """Returns a pipeline with random weights whose blocks, text and latents have the widths of SD3."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=num_blocks,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_clip_encoder(768),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip_encoder(1280),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5_encoder(4096),
        tokenizer_3=_t5_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def switch_off_and_on(
    pipe: StableDiffusion3Pipeline,
    draw: Callable[[str], Drawing],
    expected: Mapping[str, tuple[Drawing, Drawing]],
) -> None:
    """Draws every image with the adapter off and on alternately, so that their times can be compared."""
    drawings = []
    for caption in expected:
        pipe.disable_softrepa()
        off = draw(caption)
        pipe.enable_softrepa()
        drawings.append((off, draw(caption)))
    without, with_adapter = zip(*drawings, strict=True)
    ratio = _median_step(with_adapter) / _median_step(without)
    print(f"   time of a step with the adapter over without it: {ratio:.2f}; `make bench` measures it properly")
    same_off = all(not _differ(off, base) for (off, _), (base, _) in zip(drawings, expected.values(), strict=True))
    same_on = all(not _differ(on, adapted) for (_, on), (_, adapted) in zip(drawings, expected.values(), strict=True))
    _claim("off, every image is the base model's to the last bit", same_off)
    _claim("on again, every image is the adapter's to the last bit", same_on)


def sweep(pipe: StableDiffusion3Pipeline, draw: Callable[[], Drawing]) -> None:
    """Draws the same image at each weight and prints its distance from that of the base model."""
    drawings = []
    for weight in WEIGHTS:
        pipe.set_softrepa("softrepa", weight)
        drawings.append(draw())
    distances = [_distance(drawing, drawings[0]) for drawing in drawings]
    for weight, distance in zip(WEIGHTS, distances, strict=True):
        print(f"   weight {weight:4.2f}: {distance:.4f}")
    _claim("the effect grows with the weight", distances == sorted(set(distances)))


def save_grid(path: Path, captions: Sequence[str], base: Sequence[Drawing], adapted: Sequence[Drawing]) -> None:
    """Writes a grid with a row for each caption: base model, adapter, and the difference between them."""
    size, gap, line = 256, 8, 20
    columns = ("base", "with the adapter", "where the latents differ (scaled)")
    canvas = Image.new("RGB", (3 * (size + gap) + gap, line + len(captions) * (size + line + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns):
        pen.text((gap + column * (size + gap), 4), name, fill="black")
    for row, (caption, one, other) in enumerate(zip(captions, base, adapted, strict=True)):
        top = line + row * (size + line + gap)
        pen.text((gap, top + 4), caption, fill="black")
        for column, image in enumerate((one.image, other.image, _difference(one.latents, other.latents))):
            large = image.resize((size, size), Image.Resampling.NEAREST)
            canvas.paste(large, (gap + column * (size + gap), top + line))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The published SD3 adapter, from the authors' files into a pipeline.")
    published = os.environ.get("SOFTREPA_PUBLISHED_SD3") or None
    parser.add_argument("--published", default=published, help="folder of the authors' two SD3 files")
    parser.add_argument("--output", default="outputs/demo", help="where adapters and images go")
    parser.add_argument("--captions", type=int, choices=range(1, len(CAPTIONS) + 1), default=len(CAPTIONS))
    parser.add_argument("--steps", type=int, default=3, help="sampling steps")
    parser.add_argument("--blocks", type=int, default=6, help="of SD3's 24; the adapter has tokens for the first 5")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels, a multiple of 16")
    return parser


def _draw(pipe: StableDiffusion3Pipeline, caption: str, *, seed: int, steps: int, size: int) -> Drawing:
    ends = [time.perf_counter()]
    seen: list[Tensor] = []

    def note(pipe: object, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        ends.append(time.perf_counter())
        seen.append(values["latents"])
        return values

    image = pipe(
        caption,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=4.0,
        max_sequence_length=77,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=note,
    ).images[0]
    seconds = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return Drawing(image, seen[-1], seconds)


def _describe(pipe: StableDiffusion3Pipeline) -> None:
    numbers = pipe.softrepa_parameters()
    tokens = numbers["tokens"].detach()  # (L, K, D)
    print(
        f"   {sum(number.numel() for number in numbers.values()):,} numbers, adapters {pipe.get_softrepa_adapters()}"
    )
    print("   norm of a token, mean of each layer:", *(f"{norm:.2f}" for norm in tokens.norm(dim=-1).mean(dim=1)))
    offsets = numbers["timestep_tokens"].detach()  # (B, L, D)
    print(f"   norm of a timestep's offset, mean of all: {offsets.norm(dim=-1).mean():.2f}")


def _differ(one: Drawing, other: Drawing) -> bool:
    return not torch.equal(one.latents, other.latents)


def _distance(drawing: Drawing, base: Drawing) -> float:
    return ((drawing.latents - base.latents).norm() / base.latents.norm()).item()


def _median_step(drawings: Sequence[Drawing]) -> float:
    return statistics.median(seconds for drawing in drawings for seconds in drawing.step_seconds)


def _difference(one: Tensor, other: Tensor) -> Image.Image:
    """Returns the change of the latents as an image, in which white is the largest change."""
    change = (one - other)[0].norm(dim=0)  # (height, width)
    return ImageOps.autocontrast(Image.fromarray((255 * change / change.max()).to(torch.uint8).numpy()))


def _claim(sentence: str, holds: bool) -> None:
    """Prints a claim, and stops the demo if it does not hold."""
    if not holds:
        raise SystemExit(f"   NOT SO: {sentence}")
    print(f"   Checked: {sentence}.")


def _clip_tokenizer() -> CLIPTokenizer:
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return tokenizer_files.clip_tokenizer({word: index for index, word in enumerate(words)}, [], 77)


def _clip_encoder(width: int) -> CLIPTextModelWithProjection:
    start, end = 2 * len(LETTERS), 2 * len(LETTERS) + 1
    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModelWithProjection(config).eval()


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return tokenizer_files.t5_tokenizer(pieces, 512)


def _t5_encoder(width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=len(LETTERS) + 4, d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval()


if __name__ == "__main__":
    main()
