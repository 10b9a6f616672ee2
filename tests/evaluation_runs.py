"""Small evaluations for the tests, in this process or as a program of their own: `python evaluation_runs.py SETTINGS`.

Every image that is drawn is a line of `drawn.txt` beside the output folder: what was drawn is counted, not guessed.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tiny
from diffusers_softrepa.evaluation import EvaluationResult, FunctionMetric, Prompt, SetMetric, evaluate

CALL = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 2.0}
PROMPTS = [
    Prompt("0", "a red cat", "colors"),
    Prompt("1", "two dogs", "counting"),
    Prompt("2", "three dogs", "counting"),
]
ADAPTERS = [None, "a", {"a": 0.5}]


def pipeline() -> Any:
    """Returns a tiny pipeline with two adapters that show, the same at every call."""
    torch.manual_seed(0)
    pipe = tiny.sd15_pipeline()
    for name in ("a", "b"):
        pipe.add_softrepa(adapter_name=name)
        for parameter in diffusers_parameters(pipe, name):
            torch.nn.init.normal_(parameter, std=2.0)
    return pipe


def diffusers_parameters(pipe: Any, name: str) -> list[torch.nn.Parameter]:
    return list(pipe.softrepa_parameters(name).values())


class Counted:
    """A pipeline that writes down what it draws, and dies when it is told to."""

    def __init__(self, pipe: Any, log: Path, fatal: int | None = None) -> None:
        self.pipe, self.log, self.fatal = pipe, log, fatal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __call__(self, prompt: Sequence[str], **arguments: Any) -> Any:
        drawn = self.log.read_text().splitlines() if self.log.is_file() else []
        if self.fatal is not None and len(drawn) >= self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.pipe(prompt, **arguments)
        active = self.pipe.get_softrepa_adapters()
        seeds = [generator.initial_seed() for generator in arguments["generator"]]
        with self.log.open("a") as file:
            file.writelines(f"{active} {text} {seed}\n" for text, seed in zip(prompt, seeds, strict=True))
        return result


def brightness(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """A metric: how bright images are, and how red those of the category `colors`."""
    values = np.stack([np.asarray(image, dtype=float) for image in images]) / 255
    red = [
        value[..., 0].mean() if prompt.category == "colors" else np.nan
        for value, prompt in zip(values, prompts, strict=True)
    ]
    return {"all": values.mean((1, 2, 3)), "red": np.array(red)}


class ColorDistance(SetMetric):
    """A set metric: how far the mean colours are apart."""

    name = "colors"

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.tensor(np.asarray(image) / 255).float().mean((0, 1)) for image in images])

    def distance(self, features: torch.Tensor, reference_features: torch.Tensor) -> float:
        return (features.mean(0) - reference_features.mean(0)).norm().item()


REFERENCES = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]


def run(output_dir: Path | str, *, pipe: Any = None, **settings: Any) -> EvaluationResult:
    """Evaluates a tiny pipeline."""
    settings = {"prompts": PROMPTS, "adapters": ADAPTERS, "seeds": [0, 1]} | CALL | settings
    metrics = settings.pop("metrics", [FunctionMetric(brightness), ColorDistance(REFERENCES)])
    return evaluate(pipe or pipeline(), metrics=metrics, output_dir=output_dir, **settings)


def main() -> None:
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    output_dir = Path(settings.pop("output_dir"))
    fatal = settings.pop("fatal", None)
    rank = os.environ.get("RANK", "0")
    run(output_dir, pipe=Counted(pipeline(), output_dir.parent / f"drawn-{rank}.txt", fatal), **settings)


if __name__ == "__main__":
    main()
