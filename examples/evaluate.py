"""Compares the base model and adapters on a set of prompts.

    python examples/evaluate.py --pipeline MODEL --adapter mine=FOLDER --prompts prompts.txt --out evaluation
    accelerate launch examples/evaluate.py ... --metrics clip_score hps_v2.1 --seeds 0 1 2 --steps 28 --guidance 4

The first setting is the base model, then each adapter at each of `--weights`. The same command goes on where a killed
one stopped. `--debug` shows the traceback of an error. Exit status: 0 when done, 2 when something is missing or wrong.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

import diffusers_softrepa  # noqa: F401  (gives pipelines the verbs)
from diffusers_softrepa.evaluation import IMAGE_METRICS, SET_METRICS, evaluate, load_prompts
from diffusers_softrepa.evaluation.scoring import processes


def parser() -> argparse.ArgumentParser:
    """Returns what reads the command line."""
    found = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    found.add_argument("--pipeline", required=True, help="Text-to-image pipeline: Hub id or folder.")
    found.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=SOURCE", help="Folder or Hub id; several."
    )
    found.add_argument(
        "--weights", nargs="+", type=float, default=[1.0], help="Weights that each adapter is drawn at."
    )
    found.add_argument(
        "--prompts", required=True, help="COCO .json, .jsonl (GenEval), .tsv (PartiPrompts), .txt, data set."
    )
    found.add_argument("--column", help="Column of the prompts, where it is not found by its name.")
    found.add_argument("--split", default="test", help="Split of a data set.")
    found.add_argument("--limit", type=int, help="Only the first prompts.")
    found.add_argument("--images", help="Folder of COCO's images, for lpips.")
    names = ", ".join([*IMAGE_METRICS, *SET_METRICS])
    found.add_argument("--metrics", nargs="*", default=["clip_score"], metavar="NAME", help=f"Of {names}.")
    found.add_argument("--references", help=f"Folder of real pictures, for {', '.join(SET_METRICS)}.")
    found.add_argument("--seeds", nargs="+", type=int, default=[0], help="A picture of each prompt for each.")
    found.add_argument("--out", required=True, help="Folder of pictures and tables.")
    found.add_argument("--batch_size", type=int, default=1, help="Pictures drawn at once.")
    found.add_argument("--steps", type=int, help="Sampling steps; the pipeline's unless given.")
    found.add_argument("--guidance", type=float, help="Guidance scale; the pipeline's unless given.")
    found.add_argument("--size", type=int, help="Side of the pictures; the pipeline's unless given.")
    found.add_argument("--max_sequence_length", type=int, help="Text length of T5; the pipeline's unless given.")
    found.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Of the pipeline."
    )
    found.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return found


def run(given: argparse.Namespace) -> str:
    """Evaluates and returns the table."""
    prompts = load_prompts(
        given.prompts, column=given.column, split=given.split, limit=given.limit, images=given.images
    )
    pipe: Any = DiffusionPipeline.from_pretrained(given.pipeline, dtype=getattr(torch, given.dtype))
    pipe.to(processes().device)
    settings: list[Any] = [None]
    for adapter in given.adapter:
        name, equals, source = adapter.partition("=")
        if not equals:
            raise ValueError(f"an adapter is given as NAME=SOURCE, but is {adapter!r}")
        pipe.load_softrepa(source, adapter_name=name)
        settings += [name if weight == 1 else {name: weight} for weight in given.weights]
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
    return result.to_markdown()


def main(argv: Sequence[str]) -> int:
    """Evaluates and returns the exit status."""
    given = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        table = run(given)
    except (ValueError, OSError, ImportError) as error:
        if given.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if processes().is_main_process:
        print(f"\n{table}\nTables and pictures are in {given.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
