"""What re-making the paper's tables costs: operations, counted exactly, and hours of a GPU, estimated from them.

    python benchmarks/paper_cost.py [--tflops 125] [--models sd3 sdxl sd15]

The real classes at their published sizes run on the meta device, which computes nothing: denoiser, text encoders and
autoencoder. Sizes, steps and guidance are those of `examples/reproduce_paper.py`. An operation is a multiplication or
an addition of a matrix product, a convolution or an attention, as makers of GPUs count them. Hours follow from how
many of them a GPU achieves in a second, which was not measured here: `PUBLISHED` holds what others measured, and
the table says how many operations a second that was. Soft tokens add 0.03 % (docs/benchmarks.md); scoring and loading
are not counted.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

CAPTIONS = 5000  # COCO's val2017 has as many images, and the first caption of each is drawn
SETTINGS = 2  # without and with the tokens
EDITS = 1000  # per setting, for the table; how many there are is up to --edits
A100 = 312.0  # dense TFLOP/s in half precision, by its data sheet
SHARE = 0.4  # of it, assumed
T5_WORDS = 512  # reproduce_paper's max_sequence_length; CLIP's 77 come before them


@dataclass(frozen=True)
class Part:
    """One call of one module.

    Attributes:
        make: Builds it.
        inputs: Of the call.
        parameters: How many it has as published, to the last one.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    parameters: int

    def tflop(self) -> float:
        """Counts the operations of the call, in 10^12.

        Raises:
            ValueError: The module is not the published one.
        """
        with torch.device("meta"), torch.no_grad():
            module, inputs = self.make().eval(), self.inputs()
            count = sum(parameter.numel() for parameter in module.parameters())
            if count != self.parameters:
                raise ValueError(
                    f"{type(module).__name__} must have {self.parameters:,} parameters, but has {count:,}"
                )
            with FlopCounterMode(display=False) as counter:
                module.decode(**inputs) if isinstance(module, AutoencoderKL) else module(**inputs)
        return counter.get_total_flops() / 1e12


@dataclass(frozen=True)
class Model:
    """What is run for one image.

    Attributes:
        denoiser: One call, of one row: guidance makes it two.
        texts: The text encoders, for one prompt.
        decoder: From latents to the image.
    """

    denoiser: Part
    texts: tuple[Part, ...]
    decoder: Part


@dataclass(frozen=True)
class Counted:
    """Operations of a model, each in 10^12: of a denoiser call, of the texts of a prompt, of decoding."""

    denoiser: float
    texts: float
    decoder: float

    def image(self, steps: int) -> float:
        """Of an image with guidance: two rows a step, two prompts."""
        return 2 * steps * self.denoiser + 2 * self.texts + self.decoder

    def edit(self, steps: int) -> float:
        """Of an edit by FlowEdit: both prompts guided; the encoder costs about half the decoder, counted as one."""
        return 4 * steps * self.denoiser + 4 * self.texts + 2 * self.decoder


@dataclass(frozen=True)
class Published:
    """Seconds for an image that others measured: one at a time, text and decoding included, guidance taken to be on.

    Attributes:
        model: One of `MODELS`.
        gpu: Where.
        software: With what.
        steps: Sampling steps.
        seconds: For one image, of the size that we draw.
        source: Name and address.
        words: Length of T5's text; the shortest there is where the source does not say, which makes hours longer.
    """

    model: str
    gpu: str
    software: str
    steps: int
    seconds: float
    source: str
    words: int = 77


_FAL = "fal.ai's benchmarks, https://github.com/fal-ai/stable-diffusion-benchmarks"
_SDXL_CARD = "model card, https://huggingface.co/stabilityai/stable-diffusion-xl-1.0-tensorrt"
_SD3_CARD = "model card, https://huggingface.co/ckpt/stable-diffusion-3-medium-stable-diffusion-3-medium-tensorrt"
PUBLISHED = (
    Published("sd15", "A100 80 GB SXM", "diffusers, torch 2.1", 50, 1.591, _FAL),
    Published("sdxl", "A100 80 GB SXM", "diffusers, torch 2.1", 50, 5.933, _FAL),
    Published("sdxl", "A100", "not optimized", 30, 3.704, _SDXL_CARD),
    Published("sdxl", "H100", "not optimized", 30, 2.496, _SDXL_CARD),
    Published("sdxl", "H100", "TensorRT", 30, 1.471, _SDXL_CARD),
    Published("sd3", "A100", "TensorRT 10.1", 50, 5.622, _SD3_CARD),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=SHARE * A100, help="operations a second achieved, in 10^12")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    given = parser.parse_args(arguments)
    paper = reproduce_paper()
    counted = {name: counted_of(name) for name in given.models}
    print(f"Hours are an ESTIMATE, 278 x all / (TFLOP/s), here {given.tflops:.0f}; the A100's peak is {A100:.0f}.\n")
    _print_table(
        ["", "denoiser call", "texts", "decoding", "image", "images", "all, 10^18", "hours"],
        [_generation(name, paper.RECIPES[name], counted[name], given.tflops) for name in given.models]
        + (_editing(paper, counted["sd3"], given.tflops) if "sd3" in counted else []),
    )
    print(
        "\nOperations in 10^12. What others measured, the operations a second that this is, and our hours at that:\n"
    )
    rows = [_published(measured, paper, counted) for measured in PUBLISHED if measured.model in counted]
    heads = ["", "GPU", "software", "steps", "s an image", "TFLOP/s", "hours", "source"]
    _print_table(heads, rows)


@functools.cache
def counted_of(name: str, words: int = T5_WORDS) -> Counted:
    """Counts the operations of a model.

    Args:
        name: One of `MODELS`.
        words: Length of the text that T5 reads, where there is one.
    """
    model = MODELS[name](words)
    return Counted(model.denoiser.tflop(), sum(part.tflop() for part in model.texts), model.decoder.tflop())


def hours(tflop: float, tflops: float) -> float:
    """Returns how long operations take at so many a second."""
    return tflop / tflops / 3600


def reproduce_paper() -> ModuleType:
    """Returns the program whose cost this is."""
    path = Path(__file__).parents[1] / "examples" / "reproduce_paper.py"
    spec = importlib.util.spec_from_file_location("reproduce_paper", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _generation(name: str, recipe: Any, counted: Counted, tflops: float) -> list[str]:
    image, images = counted.image(recipe.steps), CAPTIONS * SETTINGS
    cells = [f"{name}, {recipe.size} px, {recipe.steps} steps", f"{counted.denoiser:.2f}", f"{counted.texts:.2f}"]
    cells += [f"{counted.decoder:.2f}", f"{image:.0f}", f"{images:,}", f"{image * images / 1e6:.2f}"]
    return [*cells, f"{hours(image * images, tflops):.1f}"]


def _editing(paper: ModuleType, counted: Counted, tflops: float) -> list[list[str]]:
    rows = []
    for label, (strength, _) in paper.EDIT_SETTINGS.items():
        steps = round(strength * paper.EDIT_STEPS)
        edit = counted.edit(steps)
        cells = [f"sd3, an edit, {label}, {steps} steps", "", "", "", f"{edit:.0f}", f"{EDITS:,}"]
        rows.append([*cells, f"{edit * EDITS / 1e6:.2f}", f"{hours(edit * EDITS, tflops):.1f}"])
    return rows


def _published(measured: Published, paper: ModuleType, counted: dict[str, Counted]) -> list[str]:
    achieved = counted_of(measured.model, measured.words).image(measured.steps) / measured.seconds
    ours = counted[measured.model].image(paper.RECIPES[measured.model].steps) * CAPTIONS * SETTINGS
    cells = [measured.model, measured.gpu, measured.software, str(measured.steps), f"{measured.seconds:.2f}"]
    return [*cells, f"{achieved:.0f}", f"{hours(ours, achieved):.1f}", measured.source]


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]))


# The models, by what their published configurations say.


def _clip(width: int, layers: int, heads: int, act: str, parameters: int) -> Part:
    config = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    make = lambda: CLIPTextModel(CLIPTextConfig(**config, num_attention_heads=heads, hidden_act=act))  # noqa: E731
    return Part(make, lambda: {"input_ids": torch.zeros(1, 77, dtype=torch.long)}, parameters)


def _t5(length: int) -> Part:
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    inputs = lambda: {"input_ids": torch.zeros(1, length, dtype=torch.long)}  # noqa: E731
    return Part(lambda: T5EncoderModel(config), inputs, 4_762_310_656)


def _decoder(channels: int, side: int, parameters: int, *, quant: bool = True) -> Part:
    def make() -> nn.Module:
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=channels,
            use_quant_conv=quant,
            use_post_quant_conv=quant,
        )

    return Part(make, lambda: {"z": torch.zeros(1, channels, side, side)}, parameters)


def _sd15_unet() -> nn.Module:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def _sdxl_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=128,
        transformer_layers_per_block=(1, 2, 10),
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _sd3_transformer() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        in_channels=16,
        out_channels=16,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )


def _unet_inputs(side: int, width: int, **more: Any) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        text = {"encoder_hidden_states": torch.zeros(1, 77, width), "timestep": torch.zeros(1)}
        added = {name: torch.zeros(1, size) for name, size in more.items()}
        return {"sample": torch.zeros(1, 4, side, side), **text, "added_cond_kwargs": added or None}

    return inputs


def _sd3_inputs(side: int, text: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "hidden_states": torch.zeros(1, 16, side, side),
        "encoder_hidden_states": torch.zeros(1, text, 4096),
        "pooled_projections": torch.zeros(1, 2048),
        "timestep": torch.zeros(1),
    }


_CLIP_L = _clip(768, 12, 12, "quick_gelu", 123_060_480)
_CLIP_G = _clip(1280, 32, 20, "gelu", 693_021_440)


def _sd15(words: int) -> Model:
    return Model(Part(_sd15_unet, _unet_inputs(64, 768), 859_520_964), (_CLIP_L,), _decoder(4, 64, 83_653_863))


def _sdxl(words: int) -> Model:
    inputs = _unet_inputs(128, 2048, text_embeds=1280, time_ids=6)
    return Model(Part(_sdxl_unet, inputs, 2_567_463_684), (_CLIP_L, _CLIP_G), _decoder(4, 128, 83_653_863))


def _sd3(words: int) -> Model:
    return Model(
        Part(_sd3_transformer, _sd3_inputs(128, 77 + words), 2_028_328_000),
        (_CLIP_L, _CLIP_G, _t5(words)),
        _decoder(16, 128, 83_819_683, quant=False),
    )


MODELS: dict[str, Callable[[int], Model]] = {"sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3}  # from the words that T5 reads


if __name__ == "__main__":
    main()
