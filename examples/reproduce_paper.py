"""Re-makes the paper's tables with the authors' adapters: generation (SD1.5, SDXL, SD3) and editing (SD3, FlowEdit).

    python examples/reproduce_paper.py --model sd3 --adapter tokens/sd3 \
        --captions captions_val2017.json --images val2017 --edits edits --out paper-sd3

`--adapter` is the authors' folder of `.pth` files, or an adapter of this package. Images are drawn with the paper's
sampling settings and scored by the metrics of its table: ImageReward, CLIP, HPS, LPIPS. A metric whose package or
weights are not there is left out with a sentence. After the first images the time that is left is told; the same
command goes on where a killed one stopped. Our numbers are printed beside the published ones. Exit status: 0 when
done, 2 when something is missing or wrong.

`--edits` is a folder with `edits.json`, a list of {"image", "source_prompt", "target_prompt"}, and the images.

Smaller runs change what is drawn, and say so: `--limit`, `--steps`, `--size`, `--pipeline`, and the scorers' models
(`--clip`, `--hps`, `--hps_clip`, `--lpips_net`).
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

import diffusers_softrepa  # noqa: F401  (gives pipelines the verbs)
from diffusers_softrepa import convert, flow_edit
from diffusers_softrepa.checkpoint import save_checkpoint
from diffusers_softrepa.evaluation import (
    CLIPScore,
    EvaluationResult,
    FunctionMetric,
    HPSv2,
    Metric,
    Prompt,
    evaluate,
    load_prompts,
    score,
)
from diffusers_softrepa.evaluation.scoring import processes


@dataclass(frozen=True)
class Recipe:
    """How the paper draws with one model.

    Attributes:
        pipeline: Its Hub id.
        family: What the authors' files are converted as.
        size: Side of the images.
        steps: Sampling steps.
        guidance: Guidance scale, 1 being none.
        ddim: Whether the scheduler is DDIM instead of the pipeline's own.
        call: Further arguments of the pipeline.
        loading: Arguments of from_pretrained.
    """

    pipeline: str
    family: str
    size: int
    steps: int
    guidance: float
    ddim: bool
    call: Mapping[str, Any]
    loading: Mapping[str, Any]


RECIPES = {
    "sd15": Recipe(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        *("unet", 512, 30, 7.0, True),
        call={},
        loading={"safety_checker": None, "requires_safety_checker": False},
    ),
    "sdxl": Recipe("stabilityai/stable-diffusion-xl-base-1.0", *("unet", 1024, 30, 7.0, True), call={}, loading={}),
    "sd3": Recipe(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        *("sd3", 1024, 28, 4.0, False),
        call={"max_sequence_length": 512},
        loading={},
    ),
}

# Published means, without and with the tokens. Source: the paper's project page.
GENERATION = {
    "sd15": {"image_reward": (0.177, 0.274), "clip": (0.265, 0.271), "hps": (0.251, 0.252), "lpips": (0.438, 0.437)},
    "sdxl": {"image_reward": (0.750, 0.852), "clip": (0.267, 0.268), "hps": (0.273, 0.283), "lpips": (0.420, 0.423)},
    "sd3": {"image_reward": (0.942, 1.085), "clip": (0.263, 0.269), "hps": (0.280, 0.289), "lpips": (0.424, 0.428)},
}
EDITING = {
    "div2k": {"image_reward": (0.380, 0.466), "clip": (0.260, 0.263), "hps": (0.255, 0.260), "lpips": (0.154, 0.149)},
    "cat2dog": {
        "image_reward": (0.937, 1.111),
        "clip": (0.225, 0.226),
        "hps": (0.266, 0.269),
        "lpips": (0.199, 0.173),
    },
}
# FlowEdit: (share of 50 steps that run, target guidance), without and with the tokens. The authors write the target
# branch as v + g (v - v_uncond), so that their 13.5 and 9 are guidance scales of 14.5 and 10.
EDIT_STEPS = 50
EDIT_SOURCE_GUIDANCE = 3.5
EDIT_SETTINGS = {"base": (33 / 50, 14.5), "softrepa": (30 / 50, 10.0)}


def parser() -> argparse.ArgumentParser:
    """Returns what reads the command line."""
    found = argparse.ArgumentParser(prog="reproduce_paper.py", description=__doc__.split("\n")[0])
    found.add_argument("--model", required=True, choices=RECIPES)
    found.add_argument("--adapter", required=True, help="The authors' folder of .pth files, or an adapter.")
    found.add_argument("--captions", help="COCO's captions_val2017.json, or any prompts.")
    found.add_argument("--images", help="Folder of COCO's val2017 images, for LPIPS.")
    found.add_argument("--edits", help="Folder with edits.json and its images.")
    found.add_argument("--edit_set", choices=EDITING, default="div2k", help="Which published numbers stand beside.")
    found.add_argument("--out", required=True, help="Folder for the images and tables.")
    found.add_argument("--batch_size", type=int, default=4)
    found.add_argument("--seeds", nargs="+", type=int, default=[0])
    found.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float16")
    found.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    found.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    smaller = found.add_argument_group("other than in the paper")
    smaller.add_argument("--pipeline", help="Another pipeline of the same kind: Hub id or folder.")
    smaller.add_argument("--limit", type=int, help="Only so many prompts and edits.")
    smaller.add_argument("--size", type=int, help="Side of the images.")
    smaller.add_argument("--steps", type=int, help="Sampling steps.")
    smaller.add_argument("--edit_steps", type=int, default=EDIT_STEPS, help="FlowEdit's steps.")
    smaller.add_argument("--max_sequence_length", type=int, help="Text length of T5.")
    smaller.add_argument("--clip", default="openai/clip-vit-large-patch14", help="CLIP model of the CLIP score.")
    smaller.add_argument("--hps", help="Checkpoint file of HPS v2.")
    smaller.add_argument("--hps_clip", help="Configuration and tokenizer of its CLIP.")
    smaller.add_argument("--hps_version", choices=("v2.0", "v2.1"), default="v2.1")
    smaller.add_argument("--lpips_net", choices=("alex", "vgg"), default="vgg")
    return found


# Metrics of the paper's table.


def image_reward(given: argparse.Namespace) -> Metric:
    """Returns ImageReward, computed by the authors' package.

    Raises:
        ImportError: The package cannot be imported.
    """
    try:
        import ImageReward
    except Exception as error:  # the package fails in many ways beside new releases of what it imports
        raise ImportError(f"ImageReward needs the package image-reward, which cannot be imported ({error})") from error
    model = ImageReward.load("ImageReward-v1.0", device=str(processes().device))
    return FunctionMetric(
        lambda images, prompts: [
            model.score(prompt.text, image) for image, prompt in zip(images, prompts, strict=True)
        ]
    )


def lpips(given: argparse.Namespace) -> Metric:
    """Returns LPIPS to the image in each prompt's metadata, both at 299 x 299, computed by the authors' package.

    Raises:
        ImportError: The package cannot be imported.
    """
    try:
        import lpips as package
    except Exception as error:  # likewise
        raise ImportError(f"LPIPS needs the package lpips, which cannot be imported ({error})") from error
    model = package.LPIPS(net=given.lpips_net, verbose=False).eval().to(processes().device)

    def tensor(image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image.convert("RGB").resize((299, 299), Image.Resampling.BICUBIC), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].to(processes().device) / 127.5 - 1  # (1, 3, 299, 299)

    def distances(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        others = [Image.open(prompt.metadata["image"]) for prompt in prompts]
        return [model(tensor(one), tensor(other)).item() for one, other in zip(images, others, strict=True)]

    return FunctionMetric(distances, higher_is_better=False)


METRICS = {
    "image_reward": image_reward,
    "clip": lambda given: CLIPScore(given.clip, weight=1.0, prefix="", name="clip"),
    "hps": lambda given: HPSv2(
        given.hps_version, weights=given.hps, **({"processing": given.hps_clip} if given.hps_clip else {})
    ),
    "lpips": lpips,
}


def available(given: argparse.Namespace, device: torch.device, *, with_images: bool) -> dict[str, Metric]:
    """Returns the metrics that can be loaded here, by name; says what the others are missing."""
    found = {}
    for name in given.metrics:
        try:
            if name == "lpips" and not with_images:
                raise OSError("LPIPS compares with the images of the captions; give --images")
            metric = METRICS[name](given)
            metric.name = name
            metric.setup(device)
            metric.close()
        except (OSError, ImportError, ValueError) as error:
            say(f"{name} is left out: {error}")
        else:
            found[name] = metric
    return found


# Models.


def load_pipeline(given: argparse.Namespace, recipe: Recipe, out: Path) -> Any:
    """Returns the pipeline on its device, with the authors' scheduler and the adapter `softrepa`."""
    source = given.pipeline or recipe.pipeline
    pipe: Any = DiffusionPipeline.from_pretrained(source, dtype=getattr(torch, given.dtype), **recipe.loading)
    if recipe.ddim:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.to(processes().device)
    pipe.load_softrepa(adapter_folder(given, recipe, out), adapter_name="softrepa")
    pipe.disable_softrepa()
    return pipe


def adapter_folder(given: argparse.Namespace, recipe: Recipe, out: Path) -> str:
    """Returns the adapter, converted first if it is the authors'."""
    if not (Path(given.adapter) / convert.TOKENS_FILE).is_file():
        return str(given.adapter)
    folder = out / "adapter"
    if processes().is_main_process:
        tokens, timestep_tokens = convert.read_reference(given.adapter)
        config, tensors = convert.convert_reference(
            tokens, timestep_tokens, family=recipe.family, base_model=recipe.pipeline
        )
        save_checkpoint(folder, config, tensors)
    processes().wait_for_everyone()
    return str(folder)


# The two experiments.


def generation(given: argparse.Namespace, recipe: Recipe, pipe: Any, metrics: Sequence[Metric]) -> EvaluationResult:
    """Draws and scores the captions, with the tokens and without."""
    call = dict(recipe.call)
    if given.max_sequence_length is not None:
        call["max_sequence_length"] = given.max_sequence_length
    size = given.size or recipe.size
    return evaluate(
        pipe,
        load_prompts(given.captions, limit=given.limit, images=given.images),
        metrics,
        [None, "softrepa"],
        output_dir=Path(given.out) / "generation",
        seeds=given.seeds,
        batch_size=given.batch_size,
        allow_truncation=True,  # as in the paper, whose captions are cut where the model stops reading
        num_inference_steps=given.steps or recipe.steps,
        guidance_scale=recipe.guidance,
        height=size,
        width=size,
        **call,
    )


def editing(given: argparse.Namespace, recipe: Recipe, pipe: Any, metrics: Sequence[Metric]) -> EvaluationResult:
    """Edits the pairs, with the tokens and without, and scores the results under their target prompts."""
    pairs = read_edits(Path(given.edits))[: given.limit]
    out, size = Path(given.out) / "editing", given.size or recipe.size
    check_unchanged(given, out, size)
    todo = [(label, pair) for label in EDIT_SETTINGS for pair in pairs]
    todo = [(label, pair) for label, pair in todo if not edited(out, label, pair).is_file()]
    state = processes()
    state.wait_for_everyone()
    own, began = todo[state.process_index :: state.num_processes], time.perf_counter()
    for done, (label, pair) in enumerate(own, start=1):
        edit(given, recipe, pipe, label, pair, edited(out, label, pair), size)
        if done == 1:
            began = time.perf_counter()  # the first one is slower than the others
        if done == 3 and len(own) > done:
            seconds = (time.perf_counter() - began) / 2
            hours = seconds * (len(own) - done) / 3600
            say(f"{seconds:.2f} s an edit and process: the {len(own) - done} left take about {hours:.2g} h")
    state.wait_for_everyone()
    images = {label: [edited(out, label, pair) for pair in pairs] for label in EDIT_SETTINGS}
    prompts = [
        Prompt(pair["id"], pair["target_prompt"], metadata={"image": str(Path(given.edits) / pair["image"])})
        for pair in pairs
    ]
    return score(images, prompts, metrics, device=pipe._execution_device)


def check_unchanged(given: argparse.Namespace, out: Path, size: int) -> None:
    """Writes down what edits are made with, or raises if those that are there were made with something else."""
    used = {
        "settings": {label: list(values) for label, values in EDIT_SETTINGS.items()},
        "source_guidance": EDIT_SOURCE_GUIDANCE,
        "seed": given.seeds[0],
        "size": size,
    }
    used |= {
        name: getattr(given, name) for name in ("pipeline", "adapter", "edit_steps", "max_sequence_length", "dtype")
    }
    path = out / "settings.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != used:
        raise ValueError(f"{out} holds edits made with {path.read_text(encoding='utf-8')}; give another --out")
    processes().wait_for_everyone()
    if processes().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(used), encoding="utf-8")


def edit(
    given: argparse.Namespace, recipe: Recipe, pipe: Any, label: str, pair: Mapping[str, str], path: Path, size: int
) -> None:
    """Edits one image and saves the result, whole or not at all."""
    strength, guidance = EDIT_SETTINGS[label]
    with Image.open(Path(given.edits) / pair["image"]) as file:
        image = file.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    if label == "softrepa":
        pipe.enable_softrepa()
    try:
        (result,) = flow_edit(
            pipe,
            image,
            pair["source_prompt"],
            pair["target_prompt"],
            num_inference_steps=given.edit_steps,
            strength=strength,
            source_guidance_scale=EDIT_SOURCE_GUIDANCE,
            target_guidance_scale=guidance,
            generator=given.seeds[0],
            max_sequence_length=given.max_sequence_length or recipe.call["max_sequence_length"],
        )
    finally:
        pipe.disable_softrepa()
    path.parent.mkdir(parents=True, exist_ok=True)
    result.save(path.with_suffix(".partial"), format="PNG")
    path.with_suffix(".partial").replace(path)


def read_edits(folder: Path) -> list[dict[str, str]]:
    """Returns the edits that a folder describes, in our names or the authors', with an id each."""
    rows = json.loads((folder / "edits.json").read_text(encoding="utf-8"))
    theirs = {"image": "img_path", "source_prompt": "prompt", "target_prompt": "tgt_prompt"}
    found = [{name: str(row.get(name) or row[other]) for name, other in theirs.items()} for row in rows]
    return [{"id": f"{number:05d}", **pair} for number, pair in enumerate(found)]


def edited(out: Path, label: str, pair: Mapping[str, str]) -> Path:
    return out / label / f"{pair['id']}.png"


# Tables.


def comparison(title: str, result: EvaluationResult, published: Mapping[str, tuple[float, float]]) -> str:
    """Returns our numbers beside the published ones."""
    heads = ["", "published", "ours", "published + tokens", "ours + tokens", "published change", "our change"]
    lines = [heads, ["---"] * len(heads)]
    base, tokens = result.settings
    for name in result.directions:
        without, with_tokens = result.row(base, name), result.row(tokens, name)
        first, second = published[name.split("/")[0]]
        lines.append(
            [
                f"{name} {'↑' if result.directions[name] else '↓'}",
                *(f"{first:.3f}", f"{without.mean:.3f} ± {without.error:.3f}"),
                *(f"{second:.3f}", f"{with_tokens.mean:.3f} ± {with_tokens.error:.3f}"),
                *(f"{second - first:+.3f}", f"{with_tokens.difference:+.3f} ± {with_tokens.difference_error:.3f}"),
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"## {title}\n\n{table}\n\n{len(result.prompts)} prompts x {len(result.seeds)} seeds; ± is a standard error.\n"
    )


def changed(given: argparse.Namespace) -> str:
    """Returns what is not as in the paper, for the head of the tables."""
    names = ("pipeline", "limit", "size", "steps", "max_sequence_length", "hps", "hps_clip")
    found = [f"{name} {getattr(given, name)}" for name in names if getattr(given, name) is not None]
    if given.edit_steps != EDIT_STEPS:
        found.append(f"edit_steps {given.edit_steps}")
    if given.clip != parser().get_default("clip"):
        found.append(f"clip {given.clip}")
    return f"Other than in the paper: {', '.join(found)}.\n" if found else "Settings as in the paper.\n"


def say(text: str) -> None:
    if processes().is_main_process:
        print(text, flush=True)


def run(given: argparse.Namespace) -> str:
    """Re-makes the tables and returns them."""
    recipe, out = RECIPES[given.model], Path(given.out)
    pipe = load_pipeline(given, recipe, out)
    tables = [f"# {given.model}\n", changed(given)]
    if given.captions is not None:
        metrics = available(given, pipe._execution_device, with_images=given.images is not None)
        result = generation(given, recipe, pipe, list(metrics.values()))
        tables.append(comparison(f"Generation, {given.model}", result, GENERATION[given.model]))
    if given.edits is not None:
        metrics = available(given, pipe._execution_device, with_images=True)
        result = editing(given, recipe, pipe, list(metrics.values()))
        tables.append(comparison(f"Editing, {given.edit_set}", result, EDITING[given.edit_set]))
    if processes().is_main_process:
        (out / "comparison.md").write_text("\n".join(tables), encoding="utf-8")
    return "\n" + "\n".join(tables) + f"\nImages and tables are in {out}."


def main(argv: Sequence[str]) -> int:
    """Re-makes the tables and returns the exit status."""
    given = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if given.captions is None and given.edits is None:
        parser().error("nothing to do: give --captions, --edits or both")
    if given.edits is not None and given.model != "sd3":
        parser().error("FlowEdit needs a flow-matching model: --edits goes with --model sd3")
    try:
        say(run(given))
    except (ValueError, OSError) as error:
        if given.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
