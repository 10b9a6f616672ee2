"""Every setting of a training run, in one dataclass that `transformers.HfArgumentParser` turns into a command line.

The defaults are SoftREPA's recipe, with one timestep and one noise per image where the paper draws one for the batch
(`share_timestep` and `share_noise` bring that back).
"""

import ast
import functools
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType, UnionType
from typing import Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from accelerate.utils import parse_flag_from_env

from ..files import parse_json
from ..noising import TimestepDensity
from ..objectives import AGSM, Contrastive, Denoising, Logits, Objective, SoftRank
from ..quoting import quoted

ObjectiveName = Literal["softrepa", "agsm", "soft_rank", "denoising"]
MixedPrecision = Literal["no", "fp16", "bf16"]

# Former names of settings -> the names of transformers or the scripts of diffusers.
RENAMED = {
    "hub_private": "hub_private_repo",
    "optimizer": "optim",
    "optimizer_arguments": "optim_args",
    "timestep_mean": "logit_mean",
    "timestep_std": "logit_std",
    "validation_steps": "eval_steps",
}


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings under their present names, with a warning for each former name.

    Raises:
        ValueError: A setting is given under both names.
    """
    found = dict(settings)
    for former, name in RENAMED.items():
        if former in found:
            if name in found:
                raise ValueError(f"{former} is the former name of {name}, and both are given; leave out {former}")
            warnings.warn(f"{former} is called {name} now; rename it in your settings", FutureWarning, stacklevel=3)
            found[name] = found.pop(former)
    return found


def _described(cls: Any) -> Any:
    """Gives each field the text of the docstring as its help on the command line, and accepts former names."""
    lines = re.sub(r"\n {8,}", " ", inspect.cleandoc(cls.__doc__)).split("\n")
    found = (re.fullmatch(r" {4}(\w+): (.*)", line) for line in lines)
    help_of = {line[1]: line[2] for line in found if line}
    for setting in fields(cls):
        setting.metadata = MappingProxyType({"help": help_of[setting.name]})  # type: ignore[attr-defined]
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        init(self, *args, **with_new_names(given))

    cls.__init__ = __init__
    return cls


@_described
@dataclass
class ContrastiveFlowMatchingArguments:
    """Settings of `ContrastiveFlowMatchingTrainer`.

    Where transformers' `TrainingArguments` or the training scripts of diffusers have a setting, it has their name.

    Attributes:
        output_dir: Folder of checkpoints, logs, images and the trained adapter.
        objective: softrepa (contrastive), agsm (two token banks, bounded), soft_rank (bounded ranking) or denoising
            (no contrast).
        logits: Logits of softrepa: exponential as published, or linear (InfoNCE).
        temperature: Temperature of the objective, in units of the errors (soft_rank: of their spread). None is the
            objective's default, 0.07 for softrepa; where exponential logits would have no gradient at that, linear
            logits and a temperature are chosen from the errors of the first batches.
        logit_scale: Scale of softrepa's exponential logits.
        denoising_weight: Weight of softrepa's denoising term. None is the published one: 0 for flow matching, 10
            otherwise.
        resolution: Side of the square images in pixels; with buckets, side of a square of their area.
        aspect_buckets: Keep aspect ratios, by sorting images into sizes of about equal area.
        random_crop: Crop at a random place instead of the centre.
        random_flip: Mirror images at random. Makes captions that say left or right wrong.
        image_column: Column of the images. None finds it by its usual names.
        caption_column: Column of the caption or captions. None finds it by its usual names.
        negative_caption_column: Column of captions written to be wrong for the image.
        dataloader_num_workers: Threads that read and decode images ahead; 0 for none.
        max_broken: Share of examples that may be unreadable before training stops.
        cache_latents: Keep latents on disk. Fixes each image's crop.
        cache_text: Keep encoded captions on disk.
        cache_dir: Folder of the caches. None is output_dir/cache.
        max_cache_gigabytes: Size beyond which caches are refused before they are written.
        train_batch_size: Images in a batch of one process; their captions are each other's negatives.
        gradient_accumulation_steps: Batches whose gradients are averaged for one step. 1 takes accelerate's own
            setting.
        num_train_epochs: Passes over the data, unless max_steps is given.
        max_steps: Optimizer steps of the whole run.
        pair_chunk_size: Pairs that run at once. None is 16; halved when memory runs out.
        num_backward_negatives: Sampled negatives that each image trains, without bias. None trains all.
        learning_rate: Learning rate.
        optim: Class of torch.optim, also in transformers' spelling (adamw_torch); prodigy, schedule_free, adamw_8bit,
            lion and other short names of installed packages; or the import path of any optimizer.
        optim_args: Other arguments of the optimizer, as name=value pairs with commas between them, or as JSON.
        lr_scheduler: warm_restarts as published, or a name that diffusers.optimization.get_scheduler knows.
        lr_warmup_steps: Steps of linear warm-up, for diffusers' schedules.
        lr_restart_period: Updates of the rate between restarts, for warm_restarts.
        lr_update_steps: Optimizer steps between updates of the rate, for warm_restarts.
        lr_floor: Lowest rate, for warm_restarts.
        max_grad_norm: Norm to which the gradient is clipped. None does not clip.
        ema_decay: Decay of a moving average of the tokens, which is then what is saved.
        timestep_density: Density of the timesteps: uniform, logit_normal or shifted.
        logit_mean: Mean of logit_normal; above 0 gives more noise.
        logit_std: Standard deviation of logit_normal.
        timestep_shift: Shift of shifted; above 1 gives more noise.
        min_timestep: Lowest timestep that is trained; the density is squeezed into [min, max).
        max_timestep: Timestep below which all trained timesteps lie.
        share_timestep: Draw one timestep for the whole batch, as published.
        share_noise: Draw one noise for the whole batch, as published.
        mixed_precision: Precision of the frozen models (no, fp16 or bf16); tokens stay float32. None takes the
            precision of `accelerate launch` or its config file, else no.
        gradient_checkpointing: Run the denoiser's blocks again in the backward pass to save memory.
        max_sequence_length: Text tokens of a caption, where the family leaves a choice. None is the published number.
        seed: Seed of tokens, data order, noise and timesteps.
        logging_steps: Steps between log entries.
        report_to: Trackers: tensorboard, wandb, ... or none.
        validation_prompts: Prompts drawn with and without the tokens while training.
        eval_steps: Steps between evaluations, of eval_dataset and of the validation prompts.
        validation_seed: Seed of the validation images.
        num_validation_inference_steps: Sampling steps of the validation images.
        validation_guidance_scale: Guidance scale of the validation images. None is the pipeline's.
        num_evaluation_batches: Batches that an evaluation reads.
        metric_for_best_model: Metric of an evaluation by which the adapter in output_dir/best is the best.
        greater_is_better: Whether that metric is better when it is greater.
        save_steps: Steps between checkpoints.
        checkpoints_total_limit: Checkpoints that are kept; the oldest are removed first.
        resume_from_checkpoint: A checkpoint folder, or latest.
        max_nonfinite_steps: Steps in a row with a NaN or infinite loss before training stops.
        push_to_hub: Push the trained adapter to the Hub.
        hub_model_id: Repository. None is the output folder's name in your namespace.
        hub_private_repo: Whether a repository created now is private.
        hub_license: Licence in the model card, such as apache-2.0.
        hub_token: Token. None is the stored one.
        dry_run: Print steps, parameters and memory, and stop.
        further_resolutions: Resolutions in which an epoch has every image besides resolution.
        proportion_empty_prompts: Share of the images, drawn per image and epoch, whose caption is left out.
        snr_gamma: Gamma of min-SNR weights, for models that predict noise or v; 5 is usual.
        torch_compile: Compile the denoiser.
        torch_compile_backend: Backend of torch.compile. None is inductor.
        torch_compile_mode: Mode of torch.compile, such as max-autotune.

    Raises:
        ValueError: A field is out of range, or two contradict each other.
    """

    # transformers' `EarlyStoppingCallback` reads these two.
    eval_strategy: ClassVar[str] = "steps"
    load_best_model_at_end: ClassVar[bool] = False

    output_dir: str = "outputs"

    objective: ObjectiveName = "softrepa"
    logits: Logits = "exponential"
    temperature: float | None = None
    logit_scale: float = 4.0
    denoising_weight: float | None = None

    resolution: int = 512
    aspect_buckets: bool = False
    random_crop: bool = False
    random_flip: bool = False
    image_column: str | None = None
    caption_column: str | None = None
    negative_caption_column: str | None = None
    dataloader_num_workers: int = 2
    max_broken: float = 0.05
    cache_latents: bool = False
    cache_text: bool = False
    cache_dir: str | None = None
    max_cache_gigabytes: float = 50.0

    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    num_train_epochs: int = 2
    max_steps: int | None = None
    pair_chunk_size: int | None = None
    num_backward_negatives: int | None = None

    learning_rate: float = 1e-3
    optim: str = "AdamW"
    optim_args: str = '{"weight_decay": 1e-4}'
    lr_scheduler: str = "warm_restarts"
    lr_warmup_steps: int = 0
    lr_restart_period: int = 10
    lr_update_steps: int = 500
    lr_floor: float = 1e-5
    max_grad_norm: float | None = None
    ema_decay: float | None = None

    timestep_density: TimestepDensity = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timestep_shift: float = 3.0
    min_timestep: float = 0.0
    max_timestep: float = 1000.0
    share_timestep: bool = False
    share_noise: bool = False

    mixed_precision: MixedPrecision | None = None
    gradient_checkpointing: bool = False
    max_sequence_length: int | None = None

    seed: int = 0
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    validation_prompts: list[str] = field(default_factory=list)
    eval_steps: int = 500
    validation_seed: int = 0
    num_validation_inference_steps: int = 28
    validation_guidance_scale: float | None = None
    num_evaluation_batches: int = 8
    metric_for_best_model: str = "top1"
    greater_is_better: bool = True
    save_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    max_nonfinite_steps: int = 5

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_license: str | None = None
    hub_token: str | None = None
    dry_run: bool = False

    further_resolutions: list[int] = field(default_factory=list)
    proportion_empty_prompts: float = 0.0
    snr_gamma: float | None = None
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None

    def __post_init__(self) -> None:
        for name in ("report_to", "validation_prompts", "further_resolutions"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str | int) else value or [])
        if isinstance(self.report_to, list):
            self.report_to = [name for name in self.report_to if name != "none"]
        self.optim_args = json.dumps(_named_values(self.optim_args))
        for name in ("output_dir", "cache_dir", "resume_from_checkpoint"):
            if isinstance(value := getattr(self, name), str | os.PathLike):
                setattr(self, name, os.path.expanduser(value))
        for name in _COUNTS.split():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, but is {quoted(value)}")
        self._check_types()
        # With or without the prefix of `on_evaluate` or of the log, as in transformers.
        self.metric_for_best_model = self.metric_for_best_model.removeprefix("eval_").removeprefix("eval/")
        if any(side < 1 for side in self.further_resolutions):
            raise ValueError(
                f"further_resolutions must be positive numbers of pixels, but are {self.further_resolutions}"
            )
        if not 0 <= self.proportion_empty_prompts < 1:
            raise ValueError(
                f"proportion_empty_prompts must be at least 0 and below 1, but is {self.proportion_empty_prompts!r}"
            )
        for name in _POSITIVE.split() + _AT_LEAST_ZERO.split():
            value, positive = getattr(self, name), name in _POSITIVE.split()
            held = value is None or _in_float32(value)
            if value is not None and not (held and (value > 0 if positive else value >= 0)):
                wanted = ("a positive number" if positive else "0 or more") + ("" if held else " that float32 holds")
                raise ValueError(f"{name} must be {wanted}, but is {quoted(value)}")
        if not self.output_dir:
            raise ValueError("output_dir must name a folder, but is empty")
        if max(self.seed, self.validation_seed) >= 2**63:
            seeds = f"{quoted(self.seed)} and {quoted(self.validation_seed)}"
            raise ValueError(f"seeds must be below 2**63, but are {seeds}")
        self._follow_accelerate()
        if not 0 <= self.min_timestep < self.max_timestep <= 1000:
            raise ValueError(
                "timesteps must satisfy 0 <= min_timestep < max_timestep <= 1000, but are "
                f"{self.min_timestep} and {self.max_timestep}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, but is {self.ema_decay!r}")
        if self.objective == "agsm" and self.ema_decay is None:
            self.ema_decay = 0.99
        needed = self.make_objective("flow").min_negatives
        if self.train_batch_size < 1 + needed and self.negative_caption_column is None:
            raise ValueError(
                f"{self.objective} needs at least {needed} negatives for each image, but train_batch_size is "
                f"{self.train_batch_size}; raise it, or name a negative_caption_column"
            )

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is ClassVar:
                continue
            kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if not any(_is_of(getattr(self, name), kind) for kind in kinds):
                options = [option for kind in kinds if get_origin(kind) is Literal for option in get_args(kind)]
                names = [str(getattr(kind, "__name__", kind)) for kind in kinds if kind is not type(None)]
                wanted = f"one of {tuple(options)}" if options else f"of type {' or '.join(names)}"
                raise ValueError(f"{name} must be {wanted}, but is {quoted(getattr(self, name))}")

    def _follow_accelerate(self) -> None:
        """Takes over the settings of `accelerate launch` and its config file, which come as environment variables."""
        said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.mixed_precision is None and said not in get_args(MixedPrecision):
            raise ValueError(
                f"accelerate asks for mixed_precision={said!r}, but {get_args(MixedPrecision)} are known here"
            )
        if said not in ("no", self.mixed_precision or said):
            raise ValueError(
                f"mixed_precision={self.mixed_precision!r} contradicts accelerate, which was told {said!r}; leave one "
                "of them out"
            )
        self.mixed_precision = self.mixed_precision or cast(MixedPrecision, said)
        count = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if not count.isdecimal():
            raise ValueError(
                f"accelerate asks for gradient_accumulation_steps={count!r}, but it must be a whole number"
            )
        steps = int(count)
        if steps > 1 and self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} contradicts accelerate, which was "
                f"told {steps}; leave one of them out"
            )
        self.gradient_accumulation_steps = max(steps, self.gradient_accumulation_steps)
        dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
        if dynamo != "no" and not self.torch_compile:
            self.torch_compile, self.torch_compile_backend = True, dynamo
            self.torch_compile_mode = os.environ.get("ACCELERATE_DYNAMO_MODE", self.torch_compile_mode)
        for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
                raise ValueError(
                    f"accelerate was told to use {name}, which shards models in training, but here the models are "
                    "frozen and only the tokens train; choose plain multi-GPU training in `accelerate config`"
                )

    def make_objective(self, prediction: str) -> Objective:
        """Returns the objective that these settings describe.

        Args:
            prediction: What the denoiser predicts, `"flow"`, `"epsilon"` or `"v_prediction"`; softrepa's published
                denoising weight depends on it.
        """
        given = {} if self.temperature is None else {"temperature": self.temperature}
        if self.objective == "denoising":
            return Denoising()
        if self.objective != "softrepa":
            return AGSM(**given) if self.objective == "agsm" else SoftRank(**given)
        weight = self.denoising_weight
        if weight is None:
            weight = 0.0 if prediction == "flow" else 10.0
        return Contrastive(logits=self.logits, logit_scale=self.logit_scale, denoising_weight=weight, **given)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain values, without the token."""
        return {name: value for name, value in asdict(self).items() if name != "hub_token"}


def _is_of(value: Any, kind: Any) -> bool:
    """Returns whether a value is of a field's type; integers are floats too, booleans are not."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(entry, get_args(kind)[0]) for entry in value)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # a whole number may be larger; NaN is not
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _in_float32(value: int | float) -> bool:
    """Returns whether a number is still itself in the precision of training, neither infinite nor rounded to 0."""
    bounds = torch.finfo(torch.float32)
    return isinstance(value, int) or value == 0 or bounds.tiny <= abs(value) <= bounds.max


def _named_values(given: Any) -> dict[str, Any]:
    """Returns arguments given as a dict, as a JSON object, or as in `betas=(0.9, 0.99),eps=1e-6`.

    Raises:
        ValueError: They are none of these.
    """
    found = given
    try:
        if isinstance(given, str) and not given.lstrip().startswith(("{", "[", '"')):
            call: Any = ast.parse(f"f({given})", mode="eval").body
            found = {word.arg: ast.literal_eval(word.value) for word in call.keywords} if not call.args else None
        elif isinstance(given, str):
            found = parse_json(given, "optim_args")
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"optim_args must be name=value pairs or a JSON object, but are {given!r}")
    return found


_COUNTS = """resolution train_batch_size gradient_accumulation_steps num_train_epochs max_steps pair_chunk_size
num_backward_negatives lr_restart_period lr_update_steps logging_steps eval_steps num_validation_inference_steps
num_evaluation_batches save_steps checkpoints_total_limit max_nonfinite_steps max_sequence_length"""
_POSITIVE = """learning_rate logit_std timestep_shift temperature logit_scale max_grad_norm max_cache_gigabytes
snr_gamma"""
_AT_LEAST_ZERO = """denoising_weight max_broken lr_floor lr_warmup_steps dataloader_num_workers seed validation_seed
validation_guidance_scale"""
