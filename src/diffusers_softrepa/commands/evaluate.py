"""`softrepa evaluate`: compares the base model and adapters on a set of prompts.

    softrepa evaluate --pipeline MODEL --adapter mine=FOLDER --prompts prompts.txt --out evaluation
    accelerate launch -m diffusers_softrepa evaluate ... --metrics clip_score hps_v2.1 --seeds 0 1 2

The first setting is the base model, then each adapter at each of `--weights`. The same command goes on where a killed
one stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import IMAGE_METRICS, SET_METRICS, evaluate, load_prompts
from ..evaluation.gallery import Gallery
from ..evaluation.metrics import as_metrics
from ..evaluation.scoring import processes
from ..evaluation.settings import Setting
from .models import PipelineOptions, placed_pipeline
from .settings import needed, option, parse


@dataclass
class EvaluateOptions:
    """What is compared, on what, and by what."""

    prompts: str = needed("COCO .json, .jsonl (GenEval), .tsv (PartiPrompts), .txt, or a data set of the Hub.")
    out: str = needed("Folder of the images and tables.")
    adapter: list[str] = option("Adapters as NAME=SOURCE, SOURCE being a folder or Hub id.", [])
    weights: list[float] = option("Weights at which each adapter is drawn.", [1.0])
    column: str | None = option("Column of the prompts, where it is not found by its name.")
    split: str = option("Split of a data set.", "test")
    limit: int | None = option("How many prompts, from the first one; all unless given.")
    images: str | None = option("Folder of COCO's images, for lpips.")
    metrics: list[str] = option(f"Metrics: some of {', '.join([*IMAGE_METRICS, *SET_METRICS])}.", ["clip_score"])
    references: str | None = option(f"Folder of real images, for {', '.join(SET_METRICS)}.")
    seeds: list[int] = option("Seeds; each prompt is drawn once for each.", [0])
    batch_size: int = option("Images drawn at once.", 1)
    steps: int | None = option("Sampling steps; the pipeline's own number unless given.")
    guidance: float | None = option("Guidance scale; the pipeline's own unless given.")
    size: int | None = option("Side of the square images in pixels; the pipeline's own unless given.")
    max_sequence_length: int | None = option("Text tokens per prompt for T5; the pipeline's own unless given.")
    dry_run: bool = option("Print what would be drawn, and stop.", False)


def main(argv: Sequence[str]) -> None:
    """Evaluates, and prints the table."""
    pipeline, given = parse(
        "evaluate",
        "Compares the base model and adapters on a set of prompts.",
        (PipelineOptions, EvaluateOptions),
        argv,
    )
    prompts = load_prompts(
        given.prompts, column=given.column, split=given.split, limit=given.limit, images=given.images
    )
    sources = [_named(adapter) for adapter in given.adapter]
    settings: list[Any] = [None]
    settings += [name if weight == 1 else {name: weight} for name, _ in sources for weight in given.weights]
    if given.dry_run:
        as_metrics(given.metrics, given.references)
        labels = [Setting(_label(setting)) for setting in settings]
        gallery = Gallery(given.out, labels, prompts, given.seeds)
        print(
            f"{len(settings)} settings x {len(prompts)} prompts x {len(given.seeds)} seeds: {len(gallery.pictures)} "
            f"images, of which {len(gallery.missing())} are not in {given.out} yet"
        )
        return
    pipe = placed_pipeline(pipeline)
    for name, source in sources:
        pipe.load_softrepa(source, adapter_name=name, token=pipeline.token)
    call = {
        "num_inference_steps": given.steps,
        "guidance_scale": given.guidance,
        "height": given.size,
        "width": given.size,
        "max_sequence_length": given.max_sequence_length,
    }
    result = evaluate(
        pipe,
        prompts,
        given.metrics,
        settings,
        output_dir=given.out,
        seeds=given.seeds,
        batch_size=given.batch_size,
        references=given.references,
        **{name: value for name, value in call.items() if value is not None},
    )
    if processes().is_main_process:
        print(f"\n{result.to_markdown()}\nTables and images are in {given.out}.")


def _named(adapter: str) -> tuple[str, str]:
    name, equals, source = adapter.partition("=")
    if not equals or not name or not source:
        raise ValueError(f"an adapter is given as NAME=SOURCE, but is {adapter!r}")
    return name, source


def _label(setting: Any) -> str:
    if isinstance(setting, dict):
        return "+".join(f"{name}:{weight:g}" for name, weight in setting.items())
    return setting or "base"
