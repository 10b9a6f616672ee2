"""Every setting of a training run, in one dataclass that `transformers.HfArgumentParser` turns into a command line.

The defaults are SoftREPA's recipe, with one timestep and one noise per image where the paper draws one for the batch
(`share_timestep` and `share_noise` bring that back).
"""

import ast
import functools
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType, UnionType
from typing import Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

from ..files import parse_json
from ..noising import TimestepDensity
from ..objectives import AGSM, Contrastive, Denoising, Logits, Objective, SoftRank
from ..quoting import quoted

ObjectiveName = Literal["softrepa", "agsm", "soft_rank", "denoising"]
MixedPrecision = Literal["no", "fp16", "bf16"]

# Former name -> the name that transformers or the scripts of diffusers have for the same.
RENAMED = {
    "hub_private": "hub_private_repo",
    "optimizer": "optim",
    "optimizer_arguments": "optim_args",
    "timestep_mean": "logit_mean",
    "timestep_std": "logit_std",
    "validation_steps": "eval_steps",
}


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings under their present names; warns of former ones, of files and programs written before.

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
    """Gives each field the text of the docstring as its help on the command line, and lets former names in."""
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
        output_dir: Folder of checkpoints, logs, pictures and the trained adapter.
        objective: softrepa (contrastive), agsm (two banks, bounded), soft_rank (bounded ranking) or denoising (no
            contrast).
        logits: Of softrepa: exponential as published, or linear (InfoNCE).
        temperature: Temperature of the objective, in units of the errors (soft_rank: of their spread). None for its
            own default, 0.07 for softrepa; where exponential logits would vanish at that, None chooses linear logits
            and a temperature by the errors of the first batches.
        logit_scale: Scale S of softrepa's exponential logits.
        denoising_weight: Weight W of softrepa's denoising term. None for the published one: 0 for flow matching, 10
            otherwise.
        resolution: Side of the square images in pixels, or of a square of the same area with buckets.
        aspect_buckets: Keep aspect ratios: group images into buckets of about equal area.
        random_crop: Crop at a random place instead of the centre.
        random_flip: Mirror images at random. Makes captions that say left or right wrong.
        image_column: Column of the images; found by its name unless given.
        caption_column: Column of the caption or captions; found by its name unless given.
        negative_caption_column: Column of captions written to be wrong for the image.
        dataloader_num_workers: Workers, threads of this process, that read and decode images ahead; 0 for none.
        max_broken: Share of examples that may be unreadable before training stops.
        cache_latents: Keep latents on disk. Fixes each image's crop.
        cache_text: Keep encoded captions on disk.
        cache_dir: Folder of the caches; output_dir/cache unless given.
        max_cache_gigabytes: Caches that would be larger are refused before they are started.
        train_batch_size: Images in a batch of one process; their captions are each other's negatives.
        gradient_accumulation_steps: Batches whose gradients are averaged for one step; 1 leaves it to accelerate's own
            settings.
        num_train_epochs: Passes over the data, unless max_steps is given.
        max_steps: Optimizer steps of the whole run.
        pair_chunk_size: Pairs that run at once; 16 unless given, halved when memory runs out.
        num_backward_negatives: Sampled negatives that each image trains, without bias; all unless given.
        learning_rate: Learning rate.
        optim: Class of torch.optim, also in transformers' spelling (adamw_torch), or the import path of any optimizer.
        optim_args: Its other arguments, as name=value pairs with commas between them, or as JSON.
        lr_scheduler: warm_restarts as published, or a name that diffusers.optimization.get_scheduler knows.
        lr_warmup_steps: Steps of linear warm-up, for diffusers' schedules.
        lr_restart_period: Of warm_restarts: updates of the rate between restarts.
        lr_update_steps: Of warm_restarts: optimizer steps between updates of the rate.
        lr_floor: Of warm_restarts: lowest rate.
        max_grad_norm: Clip the norm of the gradient; not clipped unless given.
        ema_decay: Decay of a moving average of the tokens, which is then what is saved.
        timestep_density: uniform, logit_normal or shifted.
        logit_mean: Of logit_normal: mean; above 0 favours noise.
        logit_std: Of logit_normal: standard deviation.
        timestep_shift: Of shifted: shift; above 1 favours noise.
        min_timestep: Timesteps below are not trained: density is squeezed into [min, max).
        max_timestep: Timesteps from here on are not trained.
        share_timestep: One timestep for the whole batch, as published.
        share_noise: One noise for the whole batch, as published.
        mixed_precision: Precision of the frozen models, tokens stay float32: that of `accelerate launch` or its config
            file unless given, no without either.
        gradient_checkpointing: Run the denoiser's blocks again in the backward pass to save memory.
        max_sequence_length: Text tokens per caption, where the family leaves a choice; the published number unless
            given.
        seed: Of tokens, data order, noise and timesteps.
        logging_steps: Steps between log entries.
        report_to: Trackers: tensorboard, wandb, ... or none.
        validation_prompts: Prompts drawn with and without the tokens while training.
        eval_steps: Steps between validation pictures and held-out evaluations.
        validation_seed: Seed of the validation pictures.
        num_validation_inference_steps: Sampling steps of the validation pictures.
        validation_guidance_scale: Guidance of the validation pictures; the pipeline's if not given.
        num_evaluation_batches: Held-out batches that an evaluation reads.
        metric_for_best_model: Held-out figure by which the adapter in output_dir/best is the best.
        greater_is_better: Whether that figure is better when it is greater.
        save_steps: Steps between checkpoints.
        checkpoints_total_limit: Checkpoints that are kept; the oldest go first.
        resume_from_checkpoint: A checkpoint folder, or latest.
        max_nonfinite_steps: Steps in a row whose loss is NaN or infinite before training stops.
        push_to_hub: Share the trained adapter on the Hub.
        hub_model_id: Repository; the output folder's name in your namespace unless given.
        hub_private_repo: Whether a repository made now is private.
        hub_license: Licence for the model card, such as apache-2.0; none unless given.
        hub_token: Token; the stored one unless given.
        dry_run: Print steps, parameters and memory, and stop.
        further_resolutions: Resolutions in which an epoch has every image besides resolution.
        proportion_empty_prompts: Share of the images, drawn per image and epoch, whose caption is left out.
        snr_gamma: Min-SNR weighting of the images by their timestep, for models that predict noise or v; 5 is usual.
        torch_compile: Compile the denoiser.
        torch_compile_backend: Backend of torch.compile; inductor unless given.
        torch_compile_mode: Mode of torch.compile, such as max-autotune.

    Raises:
        ValueError: A field is out of range, or two contradict each other.
    """

    # What callbacks of transformers ask for besides: `EarlyStoppingCallback` reads them.
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
        for side in self.further_resolutions:
            if side < 1:
                raise ValueError(f"further_resolutions must be whole numbers of pixels, but one is {side!r}")
        if not 0 <= self.proportion_empty_prompts < 1:
            raise ValueError(
                f"proportion_empty_prompts must be at least 0 and below 1, but is {self.proportion_empty_prompts!r}"
            )
        if self.snr_gamma is not None and not 0 < self.snr_gamma < math.inf:
            raise ValueError(f"snr_gamma must be a positive number, or None, but is {self.snr_gamma!r}")
        for name in _POSITIVE.split() + _AT_LEAST_ZERO.split():
            value, positive = getattr(self, name), name in _POSITIVE.split()
            if value is not None and not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
                raise ValueError(
                    f"{name} must be {'a positive number' if positive else '0 or more'}, but is {value!r}"
                )
        if not self.output_dir:
            raise ValueError("output_dir must name a folder, but is empty")
        if max(self.seed, self.validation_seed) >= 2**63:
            raise ValueError(f"seeds must be below 2**63, but are {self.seed} and {self.validation_seed}")
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
        """Takes over what `accelerate launch` and its config file say, which come as environment variables."""
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
        steps = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
        if steps > 1 and self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} contradicts accelerate, which was "
                f"told {steps}; leave one of them out"
            )
        self.gradient_accumulation_steps = max(steps, self.gradient_accumulation_steps)
        for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
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
        if self.objective == "agsm":
            return AGSM(**given)
        if self.objective == "soft_rank":
            return SoftRank(**given)
        if self.objective == "denoising":
            return Denoising()
        weight = self.denoising_weight
        if weight is None:
            weight = 0.0 if prediction == "flow" else 10.0
        return Contrastive(logits=self.logits, logit_scale=self.logit_scale, denoising_weight=weight, **given)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain values, without the token."""
        return {name: value for name, value in asdict(self).items() if name != "hub_token"}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; whole numbers are numbers, truth values are not."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(entry, get_args(kind)[0]) for entry in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


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
_POSITIVE = "learning_rate logit_std timestep_shift temperature logit_scale max_grad_norm max_cache_gigabytes"
_AT_LEAST_ZERO = """denoising_weight max_broken lr_floor lr_warmup_steps dataloader_num_workers seed validation_seed
validation_guidance_scale"""
