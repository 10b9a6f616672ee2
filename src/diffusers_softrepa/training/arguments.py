"""Every setting of a training run, in one dataclass that `transformers.HfArgumentParser` turns into a command line.

The defaults are SoftREPA's recipe, with one timestep and one noise per image where the paper draws one for the batch
(`share_timestep` and `share_noise` bring that back).
"""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from ..noising import TimestepDensity
from ..objectives import AGSM, Contrastive, Denoising, Logits, Objective, SoftRank

ObjectiveName = Literal["softrepa", "agsm", "soft_rank", "denoising"]
MixedPrecision = Literal["no", "fp16", "bf16"]


def _option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ContrastiveFlowMatchingArguments:
    """Settings of `ContrastiveFlowMatchingTrainer`; each field says what it is in its `help`.

    Raises:
        ValueError: A field is out of range, or two contradict each other.
    """

    output_dir: str = _option("Folder of checkpoints, logs, pictures and the trained adapter.", "outputs")

    objective: ObjectiveName = _option(
        "softrepa (contrastive), agsm (two banks, bounded), soft_rank (bounded ranking) or denoising (no contrast).",
        "softrepa",
    )
    logits: Logits = _option("Of softrepa: exponential as published, or linear (InfoNCE).", "exponential")
    temperature: float | None = _option(
        "Temperature of the objective, in units of the errors (soft_rank: of their spread). None for its own default."
    )
    logit_scale: float = _option("Scale S of softrepa's exponential logits.", 4.0)
    denoising_weight: float | None = _option(
        "Weight W of softrepa's denoising term. None for the published one: 0 for flow matching, 10 otherwise."
    )

    resolution: int = _option(
        "Side of the square images in pixels, or of a square of the same area with buckets.", 512
    )
    aspect_buckets: bool = _option("Keep aspect ratios: group images into buckets of about equal area.", False)
    random_crop: bool = _option("Crop at a random place instead of the centre.", False)
    random_flip: bool = _option("Mirror images at random. Makes captions that say left or right wrong.", False)
    image_column: str | None = _option("Column of the images; found by its name unless given.")
    caption_column: str | None = _option("Column of the caption or captions; found by its name unless given.")
    negative_caption_column: str | None = _option("Column of captions written to be wrong for the image.")
    dataloader_num_workers: int = _option("Threads that read and decode images ahead.", 2)
    max_broken: float = _option("Share of examples that may be unreadable before training stops.", 0.05)
    cache_latents: bool = _option("Keep latents on disk. Fixes each image's crop.", False)
    cache_text: bool = _option("Keep encoded captions on disk.", False)
    cache_dir: str | None = _option("Folder of the caches; output_dir/cache unless given.")
    max_cache_gigabytes: float = _option("Caches that would be larger are refused before they are started.", 50.0)

    train_batch_size: int = _option("Images in a batch of one process; their captions are each other's negatives.", 4)
    gradient_accumulation_steps: int = _option("Batches whose gradients are averaged for one step.", 1)
    num_train_epochs: int = _option("Passes over the data, unless max_steps is given.", 2)
    max_steps: int | None = _option("Optimizer steps of the whole run.")
    pair_chunk_size: int | None = _option("Pairs that run at once; 16 unless given, halved when memory runs out.")
    num_backward_negatives: int | None = _option(
        "Sampled negatives that each image trains, without bias; all unless given."
    )

    learning_rate: float = _option("Learning rate.", 1e-3)
    optimizer: str = _option("Class of torch.optim, or the import path of any optimizer.", "AdamW")
    optimizer_arguments: str = _option("Its other arguments, as JSON.", '{"weight_decay": 1e-4}')
    lr_scheduler: str = _option(
        "warm_restarts as published, or a name that diffusers.optimization.get_scheduler knows.", "warm_restarts"
    )
    lr_warmup_steps: int = _option("Steps of linear warm-up, for diffusers' schedules.", 0)
    lr_restart_period: int = _option("Of warm_restarts: updates of the rate between restarts.", 10)
    lr_update_steps: int = _option("Of warm_restarts: optimizer steps between updates of the rate.", 500)
    lr_floor: float = _option("Of warm_restarts: lowest rate.", 1e-5)
    max_grad_norm: float | None = _option("Clip the norm of the gradient; not clipped unless given.")
    ema_decay: float | None = _option("Decay of a moving average of the tokens, which is then what is saved.")

    timestep_density: TimestepDensity = _option("uniform, logit_normal or shifted.", "uniform")
    timestep_mean: float = _option("Of logit_normal: mean; above 0 favours noise.", 0.0)
    timestep_std: float = _option("Of logit_normal: standard deviation.", 1.0)
    timestep_shift: float = _option("Of shifted: shift; above 1 favours noise.", 3.0)
    min_timestep: float = _option("Timesteps below are not trained: density is squeezed into [min, max).", 0.0)
    max_timestep: float = _option("Timesteps from here on are not trained.", 1000.0)
    share_timestep: bool = _option("One timestep for the whole batch, as published.", False)
    share_noise: bool = _option("One noise for the whole batch, as published.", False)

    mixed_precision: MixedPrecision = _option("Precision of the frozen models; tokens stay float32.", "no")
    gradient_checkpointing: bool = _option(
        "Run the denoiser's blocks again in the backward pass to save memory.", False
    )
    max_sequence_length: int | None = _option(
        "Text tokens per caption, where the family leaves a choice; the published number unless given."
    )

    seed: int = _option("Of tokens, data order, noise and timesteps.", 0)
    logging_steps: int = _option("Steps between log entries.", 10)
    report_to: str = _option("Tracker: tensorboard, wandb, ... or none.", "tensorboard")
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts drawn with and without the tokens while training."}
    )
    validation_steps: int = _option("Steps between validation pictures and held-out evaluations.", 500)
    validation_seed: int = _option("Seed of the validation pictures.", 0)
    num_validation_inference_steps: int = _option("Sampling steps of the validation pictures.", 28)
    validation_guidance_scale: float | None = _option(
        "Guidance of the validation pictures; the pipeline's if not given."
    )
    num_evaluation_batches: int = _option("Held-out batches that an evaluation reads.", 8)
    save_steps: int = _option("Steps between checkpoints.", 500)
    checkpoints_total_limit: int | None = _option("Checkpoints that are kept; the oldest go first.")
    resume_from_checkpoint: str | None = _option("A checkpoint folder, or latest.")
    max_nonfinite_steps: int = _option("Steps in a row whose loss is NaN or infinite before training stops.", 5)

    push_to_hub: bool = _option("Share the trained adapter on the Hub.", False)
    hub_model_id: str | None = _option("Repository; the output folder's name in your namespace unless given.")
    hub_private: bool | None = _option("Whether a repository made now is private.")
    hub_license: str | None = _option("Licence for the model card, such as apache-2.0; none unless given.")
    hub_token: str | None = _option("Token; the stored one unless given.")
    dry_run: bool = _option("Print steps, parameters and memory, and stop.", False)

    def __post_init__(self) -> None:
        for name, options in (
            ("objective", ObjectiveName),
            ("logits", Logits),
            ("timestep_density", TimestepDensity),
            ("mixed_precision", MixedPrecision),
        ):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name} must be one of {get_args(options)}, but is {getattr(self, name)!r}")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, but is {value!r}")
        for name in ("learning_rate", "timestep_std", "timestep_shift", "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, but is {value!r}")
        if not 0 <= self.min_timestep < self.max_timestep <= 1000:
            raise ValueError(
                "timesteps must satisfy 0 <= min_timestep < max_timestep <= 1000, but are "
                f"{self.min_timestep} and {self.max_timestep}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, but is {self.ema_decay!r}")
        if not isinstance(self.optimizer_arguments, str):
            self.optimizer_arguments = json.dumps(self.optimizer_arguments)
        if not isinstance(json.loads(self.optimizer_arguments), dict):
            raise ValueError(f"optimizer_arguments must be a JSON object, but are {self.optimizer_arguments!r}")
        if self.objective == "agsm" and self.ema_decay is None:
            self.ema_decay = 0.99
        needed = self.make_objective("flow").min_negatives
        if self.train_batch_size < 1 + needed and self.negative_caption_column is None:
            raise ValueError(
                f"{self.objective} needs at least {needed} negatives for each image, but train_batch_size is "
                f"{self.train_batch_size}; raise it, or name a negative_caption_column"
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


_COUNTS = (
    "resolution",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "pair_chunk_size",
    "num_backward_negatives",
    "lr_restart_period",
    "lr_update_steps",
    "logging_steps",
    "validation_steps",
    "num_validation_inference_steps",
    "num_evaluation_batches",
    "save_steps",
    "checkpoints_total_limit",
    "max_nonfinite_steps",
    "max_sequence_length",
)
