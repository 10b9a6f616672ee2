"""What a finished run leaves for people: the model card with settings, curves and pictures, and the pushed folder.

Everything is read back from the output folder, so a report can be written again at any time.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, final

from huggingface_hub import EvalResult, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..card import hub_id, model_card, section
from ..checkpoint import CONFIG_NAME, WEIGHTS_NAME, write_card
from ..compat import check_write_access
from ..config import SoftREPAConfig
from ..files import write_whole
from ..hub import CARD_NAME, UNKNOWN_REPO, check_login, push_folder
from ..objectives import Objective
from ..quoting import in_markdown, one_line
from .arguments import ContrastiveFlowMatchingArguments
from .calibration import sum_up
from .callbacks import TrainerCallback, TrainerState
from .data.dataset import Examples
from .log import LOG_NAME, read_log
from .preparation import halve_vae
from .validation import VALIDATION_FOLDER, pictures_of_grid, save_picture

logger = logging.getLogger(__name__)

SETTINGS_NAME = "training_args.json"
CURVES_NAME = "curves.png"
PICTURES_NAME = "validation.png"
GALLERY_FOLDER = "pictures"

_ESSENTIAL = ("objective", "train_batch_size", "learning_rate", "resolution", "mixed_precision", "seed")
_PRIVATE = {  # paths of this machine, and what is nobody's concern once training is over
    "output_dir",
    "cache_dir",
    "resume_from_checkpoint",
    "max_steps",
    "num_train_epochs",
    "dry_run",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_token",
    "hub_license",
    "report_to",
    "logging_steps",
    "dataloader_num_workers",
    "validation_prompts",  # listed with their pictures
}
_HELD_OUT = "held_out/"


@dataclass(frozen=True)
class Data:
    """What a run learned from.

    Attributes:
        train_images: How many, None of a stream.
        train_name: Hub id of the data set, None for other data.
        eval_name: Hub id of the held-out data set, None for other data.
    """

    train_images: int | None = None
    train_name: str | None = None
    eval_name: str | None = None


@final
class ReportCallback(TrainerCallback):
    """Ends a finished run: the adapter, the model card and, where the settings want it, the push to the Hub."""

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        trainer = given["trainer"]
        if not trainer.finished:
            return
        sum_up(trainer)
        halve_vae(trainer.pipeline)
        if trainer.average is not None:
            trainer.average.settle()
        if state.is_world_process_zero:
            trainer.save_model()
            trainer.write_report()
            for entry in [entry for entry in state.log_history if f"{_HELD_OUT}top1" in entry][-1:]:
                logger.info("%s", " ".join(gain_text(entry)))
            if args.push_to_hub:
                trainer.push_to_hub()


def data_name(dataset: Any) -> str | None:
    """Returns the Hub id that a data set was named by; paths and objects have none."""
    name = dataset.source if isinstance(dataset, Examples) else dataset
    return hub_id(name) if isinstance(name, str) else None


def write_report(
    args: ContrastiveFlowMatchingArguments,
    data: Data,
    *,
    steps: int,
    num_captions: int,
    objective: Objective | None = None,
    warnings: Sequence[str] = (),
) -> list[str]:
    """Writes settings, curves, the last validation pictures and the model card beside the adapter in `output_dir`.

    Of a card that is there only the sections that this package wrote are replaced.

    Args:
        args: The settings of the run.
        data: What it learned from.
        steps: Optimizer steps done.
        num_captions: Captions that each image is compared with, its own included.
        objective: What was trained, where it is not what the settings say.
        warnings: What was said of the run, for the card.

    Returns:
        The names of the files that the card shows.
    """
    folder = Path(args.output_dir)
    log = read_log(folder / LOG_NAME)
    write_whole(folder / SETTINGS_NAME, json.dumps(args.to_dict(), indent=2) + "\n")
    shown = []
    if any("loss" in entry for entry in log):
        draw_curves(log, num_captions=num_captions).savefig(folder / CURVES_NAME, dpi=110)
        shown.append(CURVES_NAME)
    pictures = sorted((folder / VALIDATION_FOLDER).glob("step-*.png"))
    if pictures:
        shutil.copyfile(pictures[-1], folder / PICTURES_NAME)
        shown += [PICTURES_NAME, *_write_gallery(folder, len(args.validation_prompts))]
    config = SoftREPAConfig.from_dict(SoftREPAConfig.from_json_file(str(folder / CONFIG_NAME)))
    training = _training_section(args, data, log, shown, steps, num_captions, objective, warnings)
    write_card(folder, _card(args, config, data, log, shown, training, num_captions=num_captions))
    return shown


def claim_repository(args: ContrastiveFlowMatchingArguments) -> str:
    """Makes the repository that a run will be pushed to, before hours are spent on what could not be; returns its id.

    Raises:
        OSError: The Hub does not know the login, or does not let it write there.
        ValueError: It can be no repository's name.
    """
    check_login(args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi(token=args.hub_token, library_name="diffusers-softrepa")
    try:
        validate_repo_id(name)
        repo_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        _check_writable(api, repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"the trained adapter would be pushed to {name!r}, which can be no repository's name ({one_line(error)}); "
            "give a hub_model_id such as 'you/my-tokens'"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise OSError(
            f"the Hub does not let you push to {name!r}: {one_line(error, 400)}; give a hub_model_id in a namespace "
            "of yours and a token that may write there, or train without push_to_hub"
        ) from error
    return repo_id


def _check_writable(api: HfApi, repo_id: str) -> None:
    """Asks whether one may write to a repository; a Hub that does not answer that leaves it to the push."""
    try:
        check_write_access(api, repo_id)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise


def push_report(args: ContrastiveFlowMatchingArguments) -> str:
    """Pushes the adapter in `args.output_dir` with its card, curves and pictures; returns the URL of the commit.

    Raises:
        OSError: The Hub refused; the folder is untouched.
    """
    folder = Path(args.output_dir)
    return push_folder(
        folder,
        args.hub_model_id or folder.resolve().name,
        [WEIGHTS_NAME, CONFIG_NAME, CARD_NAME],
        private=args.hub_private_repo,
        token=args.hub_token,
    )


# Curves.


def draw_curves(log: Sequence[Mapping[str, float]], *, num_captions: int) -> Figure:
    """Returns the curves of a run: training in blue, held-out pairs in orange, what guessing gives dotted.

    Args:
        log: From `read_log`.
        num_captions: Captions that each image is compared with, its own included.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    panels: Any = figure.subplots(2, 3, sharex=True)
    named = dict(zip(_PANELS, panels.flat, strict=True))
    for name, axes in named.items():
        axes.set_title(_PANELS[name], fontsize=10)
        axes.grid(alpha=0.25)
        _draw_train(axes, log, name)
        held_out = _series(log, _HELD_OUT + name)
        if held_out[0]:
            axes.plot(*held_out, color="C1", marker="o", markersize=4, label="held-out")
        if held_out[0] and _series(log, name)[0]:
            axes.legend(fontsize=8)
    named["top1"].axhline(1 / num_captions, color="0.4", linestyle=":")
    named["top1"].set_ylim(-0.03, 1.03)
    for name in ("margin", "information"):
        named[name].axhline(0, color="0.4", linestyle=":")
    for name in ("learning_rate", "gradient_norm"):
        named[name].set_ylim(bottom=0)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    return figure


def _draw_train(axes: Axes, log: Sequence[Mapping[str, float]], name: str) -> None:
    """Draws noisy entries faintly and their running mean boldly, once there are enough of them."""
    steps, values = _series(log, name)
    window = 1 if name == "learning_rate" else max(1, len(values) // 20)
    if window > 1:
        axes.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
    if values:
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, list(_running_mean(values, window)), color="C0", marker=marker, label="train")


def _series(log: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    found = [(entry["step"], entry[name]) for entry in log if name in entry]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: Sequence[float], window: int) -> Iterator[float]:
    """Yields the mean of each value and those before it, `window` in all at most."""
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        yield sum(part) / len(part)


# The card.


def _card(
    args: ContrastiveFlowMatchingArguments,
    config: SoftREPAConfig,
    data: Data,
    log: Sequence[Mapping[str, float]],
    shown: Sequence[str],
    training: str,
    *,
    num_captions: int,
) -> str:
    card = model_card(config, UNKNOWN_REPO, license=args.hub_license)
    names = list(dict.fromkeys(name for name in (data.train_name, data.eval_name) if name))
    card.data["datasets"] = names or None
    card.data["widget"] = _widget(args, shown)
    held_out = [entry for entry in log if f"{_HELD_OUT}top1" in entry]
    if held_out:
        card.data["model_name"] = UNKNOWN_REPO
        card.data["eval_results"] = _eval_results(held_out[-1], data, num_captions)
    card.text += "\n" + section("training", training) + "\n"
    return str(card)


def _training_section(
    args: ContrastiveFlowMatchingArguments,
    data: Data,
    log: Sequence[Mapping[str, float]],
    shown: Sequence[str],
    steps: int,
    num_captions: int,
    objective: Objective | None,
    warnings: Sequence[str],
) -> str:
    """Returns what was trained, and what was measured of it in this run; arguments as `write_report`."""
    held_out = [entry for entry in log if f"{_HELD_OUT}top1" in entry]
    chosen = [] if objective is None else [(f"{name} (chosen)", value) for name, value in vars(objective).items()]
    parts = [
        "## Training",
        _data_text(args, data, steps=steps),
        *(["### Remarks", "\n".join(f"- {in_markdown(warning)}" for warning in warnings)] if warnings else []),
        _table(("setting", "value"), [*_settings(args), *chosen]),
        *(["### Held-out pairs", _held_out_text(held_out, num_captions)] if held_out else [_UNMEASURED]),
    ]
    if CURVES_NAME in shown:
        parts += ["### Curves", f"![Loss, top-1, margin, information and rate]({CURVES_NAME})"]
    if PICTURES_NAME in shown:
        parts += ["### Pictures", _pictures_text(args)]
    return "\n\n".join(parts)


def _write_gallery(folder: Path, rows: int) -> list[str]:
    """Writes each picture with tokens of the validation grid as a file of its own, and returns their names."""
    with Image.open(folder / PICTURES_NAME) as grid:
        pictures = pictures_of_grid(grid.convert("RGB"), rows)
    names = [f"{GALLERY_FOLDER}/{row:02d}.png" for row in range(len(pictures))]
    for name, (_, with_tokens) in zip(names, pictures, strict=True):
        save_picture(with_tokens, folder / name)
    return names


def _widget(args: ContrastiveFlowMatchingArguments, shown: Sequence[str]) -> list[dict[str, Any]] | None:
    """Returns the gallery that the Hub shows: prompts, and what the adapter drew of them."""
    names = [name for name in shown if name.startswith(f"{GALLERY_FOLDER}/")]
    examples = zip(args.validation_prompts, names, strict=False)
    return [{"text": prompt, "output": {"url": name}} for prompt, name in examples] or None


def _settings(args: ContrastiveFlowMatchingArguments) -> list[tuple[str, Any]]:
    """Returns the essential settings and those that differ from the defaults."""
    rows = []
    for field in fields(args):
        value = getattr(args, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in _ESSENTIAL or (value != default and field.name not in _PRIVATE):
            rows.append((field.name, json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value))
    return rows


def _data_text(args: ContrastiveFlowMatchingArguments, data: Data, *, steps: int) -> str:
    name = f" of [{data.train_name}](https://huggingface.co/datasets/{data.train_name})" if data.train_name else ""
    images = "a stream of images" if data.train_images is None else f"{data.train_images:,} images"
    batches = f"{steps:,} steps of {args.train_batch_size * args.gradient_accumulation_steps} images per process"
    return f"Learned from {images} with captions{name} in {batches}."


def _held_out_text(entries: Sequence[Mapping[str, float]], num_captions: int) -> str:
    trained = [entry for entry in entries if entry["step"]] or list(entries)
    best = max(trained, key=lambda entry: entry[f"{_HELD_OUT}top1"])  # the earliest of equal ones, as in `best/`
    columns = {"first": entries[0], "best": best, "last": entries[-1]}
    rows = [
        (title, *(_with_error(entry, name) for entry in columns.values()))
        for name, title in _METRICS.items()
        if all(_HELD_OUT + name in entry for entry in columns.values())
    ]
    heads = ("", *(f"{when}, step {int(entry['step'])}" for when, entry in columns.items()))
    note = f"Each image is compared with {num_captions} captions; guessing finds its own at a rate of"
    return "\n\n".join([_table(heads, rows), f"{note} {1 / num_captions:.3g}.", *gain_text(entries[-1])])


def _with_error(entry: Mapping[str, float], name: str) -> str:
    """Returns a held-out figure with its standard error over the images, if that was measured."""
    error = entry.get(f"{_HELD_OUT}{name}_stderr")
    return f"{entry[_HELD_OUT + name]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def gain_text(entry: Mapping[str, float]) -> list[str]:
    """Returns a sentence on what training changed in the held-out top-1, by the last entry; none if unmeasured.

    The difference is that of the same images with the same noise, before the first step and after the last one.
    """
    gain, error = (entry.get(f"{_HELD_OUT}top1_gain{end}") for end in ("", "_stderr"))
    if gain is None or error is None:
        return []
    change = f"{gain:+.3g} ± {error:.2g}, the mean and its standard error over the images"
    if abs(gain) <= 2 * error:
        return [f"Training changed the held-out top-1 by {change}: that cannot be told from no change."]
    return [f"Training changed the held-out top-1 by {change}."]


def _eval_results(entry: Mapping[str, float], data: Data, num_captions: int) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=data.eval_name or "held-out",
            dataset_name=data.eval_name or "held-out images and captions",
            metric_type="accuracy",
            metric_name=f"top-1 of the matched caption among {num_captions}",
            metric_value=round(entry[f"{_HELD_OUT}top1"], 4),
        )
    ]


def _pictures_text(args: ContrastiveFlowMatchingArguments) -> str:
    prompts = "\n".join(f"- {in_markdown(prompt)}" for prompt in args.validation_prompts)
    note = "Without the tokens on the left, with them on the right, from the same noise:"
    return f"{note}\n\n{prompts}\n\n![Pictures without and with the tokens]({PICTURES_NAME})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[in_markdown(cell) for cell in line] for line in (heads, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], ["---"] * len(heads), *cells[1:]))


_UNMEASURED = "No held-out pairs were evaluated in this run, so nothing is known here of what the tokens gain."
_PANELS = {
    "loss": "loss",
    "top1": "top-1 of the matched caption",
    "margin": "margin: nearest wrong error - matched error",
    "information": "information bound (nats)",
    "learning_rate": "learning rate",
    "gradient_norm": "norm of the gradient",
}
_METRICS = {"top1": "top-1 of the matched caption", "margin": "margin", "information": "information bound (nats)"}
