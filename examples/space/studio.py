"""Draws prompts without and with soft tokens from the same noise, on one pipeline that all visitors share.

The page (`app.py`) uses this module, which does not depend on the page. One lock serialises everything that uses the
pipeline: loading, the weight of the adapter, drawing. Errors are raised as `CannotDraw`, with a message for visitors.
"""

import inspect
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops, ImageOps

import diffusers_softrepa  # noqa: F401  (gives pipelines the verbs)

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
# The shapes world lies beside this folder in the repository, and inside it on a Space.
PLACES = (Path(), HERE, HERE.parent)
EMBEDDED = "shapes_world/sd3"  # the pipeline whose images an oracle can read
MOST_CHARACTERS = 300
MOST_STEPS = 100
MOST_GUIDANCE = 20
COUNTS = (1, 4, 9)  # images of one order, in a square
MOST_WORK = 400  # steps of all images of one order
SEEDS = 2**32
SHOWN_SIDE = 384
FRAME = 4
RIGHT, WRONG = (46, 160, 67), (215, 58, 73)  # of frames


class CannotDraw(ValueError):
    """A request cannot be fulfilled; the message tells the visitor why."""


@dataclass(frozen=True)
class Order:
    """A request for an image. Equal orders give equal images.

    Attributes:
        prompt: Prompt of at most 300 characters.
        seed: Seed of the noise, 0 to 2**32 - 1.
        guidance_scale: Guidance scale, 0 to 20, where 1.0 is no guidance.
        steps: Number of sampling steps, 1 to 100.
        pipeline: Folder or Hub id of the pipeline.

    Raises:
        CannotDraw: An attribute is missing or out of range.
    """

    prompt: str
    seed: int
    guidance_scale: float
    steps: int
    pipeline: str

    def __post_init__(self) -> None:
        if not (self.prompt or "").strip():
            raise CannotDraw("The prompt is empty; write what should be drawn.")
        if not (self.pipeline or "").strip():
            raise CannotDraw("The pipeline is empty; give a folder or a Hub id.")
        if len(self.prompt) > MOST_CHARACTERS:
            raise CannotDraw(
                f"The prompt has {len(self.prompt)} characters, but at most {MOST_CHARACTERS} are allowed."
            )
        _check_number("seed", self.seed, 0, SEEDS - 1, whole=True)
        _check_number("guidance scale", self.guidance_scale, 0, MOST_GUIDANCE)
        _check_number("number of steps", self.steps, 1, MOST_STEPS, whole=True)

    def series(self, count: int) -> list["Order"]:
        """Returns the orders of `count` images with successive seeds, beginning with the seed of this order.

        Raises:
            CannotDraw: The number of images is not one of `COUNTS`, or they take too many steps in total.
        """
        if count not in COUNTS:
            shown = "missing" if count is None else repr(count)
            raise CannotDraw(f"The number of images must be one of {', '.join(map(str, COUNTS))}, but is {shown}.")
        if count * self.steps > MOST_WORK:
            raise CannotDraw(
                f"{count} images of {self.steps} steps take {count * self.steps} steps, but at most {MOST_WORK} are "
                "allowed at once; choose fewer images or steps."
            )
        return [replace(self, seed=(self.seed + place) % SEEDS) for place in range(count)]


class Studio:
    """A pipeline with an adapter, and a cache of the last images; may be used by any number of threads.

    Args:
        kept: Number of images in the cache. Defaults to 64.
    """

    def __init__(self, kept: int = 64) -> None:
        self._lock = threading.RLock()
        self._pipe: Any = None
        self._pipeline: str | None = None
        self._adapter: str | None = None
        self._images: OrderedDict[tuple[Order, str | None, float], Image.Image] = OrderedDict()
        self._kept = kept

    def prepare(self, pipeline: str, adapter: str | None = None) -> Any:
        """Loads the pipeline and the adapter unless they are loaded, and returns the pipeline.

        Raises:
            CannotDraw: The pipeline or the adapter cannot be loaded.
        """
        with self._lock:
            if pipeline != self._pipeline:
                self._pipe = self._pipeline = self._adapter = None  # frees its memory before the next one needs it
                self._pipe, self._pipeline = _load_pipeline(pipeline), pipeline
            if adapter is not None and adapter != self._adapter:
                self._pipe.unload_softrepa()
                self._adapter = None
                _load_adapter(self._pipe, adapter)
                self._adapter = adapter
            return self._pipe

    def knows(self, order: Order, adapter: str | None = None, weight: float = 0.0) -> bool:
        """Returns whether an image is in the cache."""
        with self._lock:
            return (order, adapter, weight) in self._images

    def draw(
        self,
        order: Order,
        adapter: str | None = None,
        weight: float = 0.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Image.Image:
        """Returns an image, from the cache or newly drawn.

        Args:
            order: The image to draw.
            adapter: Folder or Hub id of the adapter; None draws with the base model.
            weight: Weight of the adapter, 0 to 1.
            on_step: Called after each step with its number and the number of steps.

        Raises:
            CannotDraw: A name or number is wrong, or the pipeline failed.
        """
        _check_number("weight", weight, 0, 1)
        if adapter is not None and not adapter.strip():
            raise CannotDraw("The adapter is empty; give a folder or a Hub id.")
        key = (order, adapter, float(weight))
        with self._lock:
            if key not in self._images:
                pipe = self.prepare(order.pipeline, adapter)
                if adapter is not None:
                    pipe.enable_softrepa()
                    pipe.set_softrepa(list(pipe.get_softrepa_adapters()), weight)
                elif self._adapter is not None:
                    pipe.disable_softrepa()
                self._images[key] = _call(pipe, order, on_step)
                if len(self._images) > self._kept:
                    self._images.popitem(last=False)
            self._images.move_to_end(key)
            return self._images[key]


def enlarged(image: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """Returns a small image enlarged by a whole factor without smoothing; larger ones are returned unchanged."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def sheet(images: Sequence[Image.Image], verdicts: Sequence[bool] | None = None) -> Image.Image:
    """Returns images as a square sheet, framed green or red if there are verdicts; small images are enlarged."""
    columns = math.ceil(math.sqrt(len(images)))
    cells = [enlarged(image, SHOWN_SIDE // columns).convert("RGB") for image in images]
    if verdicts is not None:
        framed = zip(cells, verdicts, strict=True)
        cells = [ImageOps.expand(cell, FRAME, RIGHT if right else WRONG) for cell, right in framed]
    width, height = cells[0].width + FRAME, cells[0].height + FRAME  # with the gap to the next one
    size = (columns * width - FRAME, math.ceil(len(cells) / columns) * height - FRAME)
    canvas = Image.new("RGB", size, "white")
    for place, cell in enumerate(cells):
        canvas.paste(cell, (place % columns * width, place // columns * height))
    return canvas


def read_by_oracle(order: Order, images: Sequence[Image.Image]) -> list[bool] | None:
    """Returns which images show exactly what the prompt asks for; None if pipeline or prompt cannot be checked."""
    if order.pipeline != EMBEDDED:
        return None
    from shapes_world.oracle import judge  # here, because a Space of another pipeline comes without the shapes world
    from shapes_world.world import ask_of

    ask = ask_of(order.prompt)
    return None if ask is None else [judge(image, ask).correct for image in images]


def difference(one: Image.Image, other: Image.Image) -> float:
    """Returns the share of pixels that differ, 0 to 1."""
    bands = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).split()
    largest = ImageChops.lighter(ImageChops.lighter(bands[0], bands[1]), bands[2])
    return 1 - largest.histogram()[0] / (one.width * one.height)


def located(name: str) -> str:
    """Returns the local folder or file of a name if there is one; otherwise the name, which is a Hub id."""
    found = [place / name for place in PLACES if (place / name).exists()]
    return str(found[0]) if found else name


def _load_pipeline(name: str) -> Any:
    source = located(name)
    if source == name and not Path(name).is_dir() and name.count("/") != 1:
        raise CannotDraw(f"There is no pipeline {name!r}: it is not a folder here, and Hub ids look like user/name.")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype).to(device)
    except Exception as error:  # of many libraries; the visitor gets a sentence, the log everything
        logger.exception("loading the pipeline %s failed", name)
        raise CannotDraw(f"The pipeline {name!r} cannot be loaded: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe.get_softrepa_adapters()
    except ValueError as error:
        raise CannotDraw(
            f"{type(pipe).__name__} has no denoiser that takes soft tokens; docs/families.md lists those that do."
        ) from error
    if "prompt" not in _parameters(pipe):
        raise CannotDraw(f"{type(pipe).__name__} draws from no prompt.")
    return pipe


def _load_adapter(pipe: Any, name: str) -> None:
    source = located(name)
    if source == name and not Path(name).exists() and name.count("/") != 1:
        raise CannotDraw(f"There is no adapter {name!r}: it is not a folder here, and Hub ids look like user/name.")
    try:
        pipe.load_softrepa(source)
    except (OSError, ValueError) as error:
        raise CannotDraw(f"The adapter {name!r} cannot be loaded: {_first_line(error)}") from error


def _call(pipe: Any, order: Order, on_step: Callable[[int, int], None] | None) -> Image.Image:
    settings = {
        "guidance_scale": order.guidance_scale,
        "num_inference_steps": order.steps,
        "generator": torch.Generator().manual_seed(order.seed),
        "max_sequence_length": _text_length(pipe),
        "callback_on_step_end": _callback(order.steps, on_step),
    }
    takes = _parameters(pipe)
    taken = {name: value for name, value in settings.items() if name in takes and value is not None}
    try:
        made = pipe(order.prompt.strip(), **taken)
    except Exception as error:
        logger.exception("drawing %s failed", order)
        raise CannotDraw(f"{type(pipe).__name__} could not draw this: {_first_line(error)}") from error
    if "images" not in made:
        raise CannotDraw(f"{type(pipe).__name__} does not draw images.")
    return made.images[0]


def _text_length(pipe: Any) -> int | None:
    """Returns the longest text length of the tokenizers if it is less than the default of the pipeline."""
    lengths = [part.model_max_length for part in pipe.components.values() if hasattr(part, "model_max_length")]
    default = _parameters(pipe).get("max_sequence_length")
    return max(lengths) if lengths and default is not None and max(lengths) < default.default else None


def _callback(steps: int, on_step: Callable[[int, int], None] | None) -> Callable[..., dict[str, Any]] | None:
    def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(min(step + 1, steps), steps)  # some schedulers take more steps than asked
        return tensors

    return tell if on_step is not None else None


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipe).__call__).parameters)


def _check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (whole and not isinstance(value, int)):
        kind = "whole number" if whole else "number"
        shown = "missing" if value is None else repr(value)
        raise CannotDraw(f"The {name} must be a {kind} from {low} to {high}, but is {shown}.")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
