"""`softrepa evaluate`: compares the base model and adapters on a set of prompts.

    softrepa evaluate --pipeline MODEL --adapter mine=FOLDER --prompts prompts.txt --out evaluation
    accelerate launch -m diffusers_softrepa evaluate ... --metrics clip_score hps_v2.1 --seeds 0 1 2

The settings are the base model and each adapter at each of `--weights`. Run the same command again to continue a run
that was interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import IMAGE_METRICS, SET_METRICS, evaluate, load_prompts
from ..evaluation.gallery import Gallery
from ..evaluation.metrics import as_metrics
from ..evaluation.scoring import processes
from ..evaluation.settings import setting_of
from ..files import check_places
from .models import PipelineOptions, placed_pipeline
from .settings import needed, option, parse


@dataclass
class EvaluateOptions:
    """Options of the comparison."""

    prompts: str = needed(
        "Prompts: a COCO .json, a .jsonl (GenEval), .tsv (PartiPrompts) or .txt file, or a data set of the Hub."
    )
    out: str = needed("Folder for the images and tables.")
    adapter: list[str] = option("Adapters as NAME=SOURCE, where SOURCE is a folder or Hub id.", [])
    weights: list[float] = option("Weights that each adapter is drawn with.", [1.0])
    column: str | None = option("Column of the prompts; found by its name unless given.")
    split: str = option("Split of a data set.", "test")
    limit: int | None = option("Number of prompts to take from the start; all unless given.")
    metrics: list[str] = option(f"Metrics: some of {', '.join([*IMAGE_METRICS, *SET_METRICS])}.", ["clip_score"])
    references: str | None = option(f"Folder of real images, for {', '.join(SET_METRICS)}.")
    seeds: list[int] = option("Seeds; each prompt is drawn once with each.", [0])
    batch_size: int = option("Number of images drawn at once.", 1)
    steps: int | None = option("Sampling steps; the pipeline's own number unless given.")
    guidance: float | None = option("Guidance scale; the pipeline's own unless given.")
    size: int | None = option("Side of the square images in pixels; the pipeline's own unless given.")
    max_sequence_length: int | None = option("Number of text tokens per prompt; the pipeline's own unless given.")
    allow_truncation: bool = option("Draw prompts that are longer than the pipeline reads, without their end.", False)
    dry_run: bool = option("Print what would be drawn, and stop.", False)


MEANING = "Compares the base model and adapters on a set of prompts."
OPTIONS = (PipelineOptions, EvaluateOptions)


def main(argv: Sequence[str]) -> None:
    """Evaluates and prints the table of results."""
    pipeline, given = parse("evaluate", MEANING, OPTIONS, argv)
    check_places(given.out, what="--out")
    prompts = load_prompts(given.prompts, column=given.column, split=given.split, limit=given.limit)
    sources = [_named(adapter) for adapter in given.adapter]
    settings: list[Any] = [None]
    settings += [name if weight == 1 else {name: weight} for name, _ in sources for weight in given.weights]
    if given.dry_run:
        as_metrics(given.metrics, given.references)
        gallery = Gallery(given.out, [setting_of(setting) for setting in settings], prompts, given.seeds)
        print(
            f"{len(settings)} settings x {len(prompts)} prompts x {len(given.seeds)} seeds: {len(gallery.keys)} "
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
        allow_truncation=given.allow_truncation,
        **{name: value for name, value in call.items() if value is not None},
    )
    if processes().is_main_process:
        print(f"\n{result.to_markdown()}\nTables and images are in {given.out}.")


def _named(adapter: str) -> tuple[str, str]:
    name, equals, source = adapter.partition("=")
    if not equals or not name or not source:
        raise ValueError(f"an adapter must be given as NAME=SOURCE, but is {adapter!r}")
    return name, source
