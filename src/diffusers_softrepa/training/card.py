"""The model card of a finished run, with settings, curves and images, and the push to the Hub.

Everything is read from the output folder, so a card can be written again at any time.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, final

from huggingface_hub import EvalResult, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from matplotlib.figure import Figure

from ..card import hub_id, model_card, section
from ..checkpoint import CONFIG_NAME, WEIGHTS_NAME, write_card
from ..compat import check_write_access
from ..config import SoftREPAConfig
from ..files import write_whole
from ..hub import CARD_NAME, UNKNOWN_REPO, check_login, push_folder
from ..objectives import Objective
from ..quoting import in_markdown, markdown_table, one_line
from .arguments import ContrastiveFlowMatchingArguments
from .calibration import sum_up
from .callbacks import TrainerCallback, TrainerState
from .data.dataset import Examples
from .log import LOG_NAME, read_log
from .preparation import halve_vae
from .validation import IMAGES_FOLDER, VALIDATION_FOLDER

logger = logging.getLogger(__name__)

SETTINGS_NAME = "training_args.json"
CURVES_NAME = "curves.png"
VALIDATION_NAME = "validation.png"

Log = Sequence[Mapping[str, float]]

_ESSENTIAL = ("objective", "train_batch_size", "learning_rate", "resolution", "mixed_precision", "seed")
_PRIVATE = """output_dir cache_dir resume_from_checkpoint max_steps num_train_epochs dry_run push_to_hub hub_model_id
hub_private_repo hub_token hub_license report_to logging_steps dataloader_num_workers validation_prompts"""
_UNMEASURED = (
    "No eval_dataset was evaluated in this run, or it tells nothing, so what the tokens improve was not measured here."
)
_PANELS = {
    "loss": "loss",
    "top1": "top-1 of the matched caption",
    "margin": "margin: nearest wrong error - matched error",
    "information": "information bound (nats)",
    "learning_rate": "learning rate",
    "gradient_norm": "norm of the gradient",
}
_METRICS = {"top1": "top-1 of the matched caption", "margin": "margin", "information": "information bound (nats)"}


@dataclass(frozen=True)
class Report:
    """What the card of a run is written from, besides the output folder.

    Attributes:
        args: The settings of the run.
        steps: Optimizer steps done.
        num_captions: Captions that each image is compared with, its own included.
        train_images: Number of training images; None for a stream.
        train_name: Hub id of the training data; None for other data.
        eval_name: Hub id of the evaluation data; None for other data.
        objective: The objective in training where it was chosen by the run; None for that of the settings.
        warnings: Warnings of the run.
    """

    args: ContrastiveFlowMatchingArguments
    steps: int
    num_captions: int
    train_images: int | None = None
    train_name: str | None = None
    eval_name: str | None = None
    objective: Objective | None = None
    warnings: Sequence[str] = ()

    def write(self) -> None:
        """Writes settings, curves, the last validation images and the card beside the adapter in `output_dir`.

        In an existing card only the sections that this package wrote are replaced.
        """
        folder = Path(self.args.output_dir)
        log = read_log(folder / LOG_NAME)
        write_whole(folder / SETTINGS_NAME, json.dumps(self.args.to_dict(), indent=2) + "\n")
        has_curves = any("loss" in entry for entry in log)
        if has_curves:
            draw_curves(log, num_captions=self.num_captions).savefig(folder / CURVES_NAME, dpi=110)
        if images := sorted((folder / VALIDATION_FOLDER).glob("step-*.png")):
            shutil.copyfile(images[-1], folder / VALIDATION_NAME)
        config = SoftREPAConfig.from_dict(SoftREPAConfig.from_json_file(str(folder / CONFIG_NAME)))
        card = model_card(config, UNKNOWN_REPO, license=self.args.hub_license)
        card.data["datasets"] = list(dict.fromkeys(filter(None, (self.train_name, self.eval_name)))) or None
        names = [f"{IMAGES_FOLDER}/{number:02d}.png" for number in range(len(self.args.validation_prompts))]
        gallery = zip(self.args.validation_prompts, names, strict=True)
        shown = [{"text": prompt, "output": {"url": name}} for prompt, name in gallery if (folder / name).is_file()]
        card.data["widget"] = shown or None
        entries = evaluations(log)
        if entries:
            card.data["model_name"] = UNKNOWN_REPO
            card.data["eval_results"] = [self._eval_result(entries[-1])]
        text = self._training_section(entries, has_curves=has_curves, has_images=bool(images))
        card.text += "\n" + section("training", text) + "\n"
        write_card(folder, str(card))

    def _training_section(self, entries: Log, *, has_curves: bool, has_images: bool) -> str:
        chosen = {} if self.objective is None else vars(self.objective)
        parts = ["## Training", self._data_text()]
        if self.warnings:
            parts += ["### Remarks", "\n".join(f"- {in_markdown(warning)}" for warning in self.warnings)]
        rows = [*self._settings(), *((f"{name} (chosen)", value) for name, value in chosen.items())]
        parts.append(_table(("setting", "value"), rows))
        parts += ["### Evaluation", self._eval_text(entries)] if entries else [_UNMEASURED]
        if has_curves:
            parts += ["### Curves", f"![Loss, top-1, margin, information and rate]({CURVES_NAME})"]
        if has_images:
            prompts = "\n".join(f"- {in_markdown(prompt)}" for prompt in self.args.validation_prompts)
            note = "Without the soft tokens on the left, with them on the right, from the same noise:"
            parts += ["### Images", f"{note}\n\n{prompts}\n\n![Without and with the soft tokens]({VALIDATION_NAME})"]
        return "\n\n".join(parts)

    def _settings(self) -> list[tuple[str, Any]]:
        """Returns the essential settings and those that differ from the defaults."""
        rows = []
        for field in fields(self.args):
            value = getattr(self.args, field.name)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if field.name in _ESSENTIAL or (value != default and field.name not in _PRIVATE.split()):
                rows.append((field.name, json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value))
        return rows

    def _data_text(self) -> str:
        name = self.train_name
        source = f" of [{name}](https://huggingface.co/datasets/{name})" if name else ""
        images = "a stream of images" if self.train_images is None else f"{self.train_images:,} images"
        per_process = self.args.train_batch_size * self.args.gradient_accumulation_steps
        steps = f"{self.steps:,} steps of {per_process} images per process"
        return f"Learned from {images} with captions{source} in {steps}."

    def _eval_text(self, entries: Log) -> str:
        trained = [entry for entry in entries if entry["step"]] or list(entries)
        best = max(trained, key=lambda entry: entry["eval/top1"])  # the earliest of equal ones, as in `best/`
        columns = {"first": entries[0], "best": best, "last": entries[-1]}
        rows = [
            (title, *(_with_error(entry, f"eval/{name}") for entry in columns.values()))
            for name, title in _METRICS.items()
            if all(f"eval/{name}" in entry for entry in columns.values())
        ]
        heads = ("", *(f"{when}, step {int(entry['step'])}" for when, entry in columns.items()))
        note = f"Each image is compared with {self.num_captions} captions; chance level of top-1 is"
        return "\n\n".join([_table(heads, rows), f"{note} {1 / self.num_captions:.3g}.", *gain_text(entries[-1])])

    def _eval_result(self, entry: Mapping[str, float]) -> EvalResult:
        return EvalResult(
            task_type="text-to-image",
            dataset_type=self.eval_name or "eval",
            dataset_name=self.eval_name or "evaluation images and captions",
            metric_type="accuracy",
            metric_name=f"top-1 of the matched caption among {self.num_captions}",
            metric_value=round(entry["eval/top1"], 4),
        )


@final
class ReportCallback(TrainerCallback):
    """Saves the adapter and the model card when a run has finished, and pushes them if `push_to_hub` is set."""

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        trainer = given["trainer"]
        if not trainer.finished:
            return
        sum_up(trainer)
        halve_vae(trainer.pipeline)
        if trainer.average is not None:
            trainer.average.make_final()
        if state.is_world_process_zero:
            trainer.save_model()
            trainer.write_report()
            for entry in evaluations(state.log_history)[-1:]:
                logger.info("%s", " ".join(gain_text(entry)))
            if args.push_to_hub:
                trainer.push_to_hub()


def data_name(dataset: Any) -> str | None:
    """Returns the Hub id that a data set was named by; None for paths and objects."""
    name = dataset.source if isinstance(dataset, Examples) else dataset
    return hub_id(name) if isinstance(name, str) else None


def claim_repository(args: ContrastiveFlowMatchingArguments) -> str:
    """Creates the repository that a run will be pushed to, before the first step, and returns its id.

    Raises:
        OSError: The Hub refuses the login, or writing there.
        ValueError: The name is not a valid repository name.
    """
    check_login(args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi(token=args.hub_token, library_name="diffusers-softrepa")
    try:
        validate_repo_id(name)
        repo_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        try:
            check_write_access(api, repo_id)
        except HfHubHTTPError as error:  # a Hub that does not answer this question leaves it to the push
            if error.response is not None and error.response.status_code in (401, 403):
                raise
    except HFValidationError as error:
        raise ValueError(
            f"the trained adapter would be pushed to {name!r}, which is not a valid repository name "
            f"({one_line(error)}); give a hub_model_id such as 'you/my-tokens'"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise OSError(
            f"the Hub does not let you push to {name!r}: {one_line(error, 400)}; give a hub_model_id in a namespace "
            "of yours and a token that may write there, or train without push_to_hub"
        ) from error
    return repo_id


def push_report(args: ContrastiveFlowMatchingArguments) -> str:
    """Pushes the adapter in `output_dir` with its card, curves and images; returns the URL of the commit.

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


def draw_curves(log: Log, *, num_captions: int) -> Figure:
    """Returns the curves of a run: training in blue, evaluation in orange, chance level dotted.

    Args:
        log: Entries of `read_log`.
        num_captions: Captions that each image is compared with, its own included.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    panels: Any = figure.subplots(2, 3, sharex=True)
    named = dict(zip(_PANELS, panels.flat, strict=True))
    for name, axes in named.items():
        axes.set_title(_PANELS[name], fontsize=10)
        axes.grid(alpha=0.25)
        for key, colour, label in ((name, "C0", "train"), (f"eval/{name}", "C1", "eval")):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            if not points:
                continue
            steps, values = map(list, zip(*points, strict=True))
            window = len(values) // 20 if label == "train" and name != "learning_rate" else 1
            if window > 1:  # noisy: the values faint, their running mean bold
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                values = [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
            marker = "o" if label == "eval" or len(points) == 1 else None
            axes.plot(steps, values, color=colour, marker=marker, markersize=4, label=label)
        if len({line.get_color() for line in axes.lines}) > 1:
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


def evaluations(log: Log) -> list[Mapping[str, float]]:
    """Returns the entries of evaluations."""
    return [entry for entry in log if "eval/top1" in entry]


def gain_text(entry: Mapping[str, float]) -> list[str]:
    """Returns a sentence on what training changed in `eval/top1` by the last entry; none if it was not measured.

    The difference is that of the same images with the same noise, before the first step and after the last one.
    """
    gain, error = (entry.get(f"eval/top1_gain{end}") for end in ("", "_stderr"))
    if gain is None or error is None:
        return []
    change = f"{gain:+.3g} ± {error:.2g}, the mean and its standard error over the images"
    unclear = ": that cannot be told from no change" if abs(gain) <= 2 * error else ""
    return [f"Training changed the top-1 of the evaluation images by {change}{unclear}."]


def _with_error(entry: Mapping[str, float], name: str) -> str:
    error = entry.get(f"{name}_stderr")
    return f"{entry[name]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return markdown_table(list(map(in_markdown, heads)), [list(map(in_markdown, row)) for row in rows])
