"""The trainer: soft tokens learned by contrast on your own images, resumable at every step.

One step: load examples, noise each image once and pair it with the captions of the batch, let the engine run the
pairs, and update the tokens. Everything random is drawn from the seed and the number of the batch, so a run that was
killed and resumed ends bit-equal to one that was not. What happens around the steps are callbacks.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from ..adapter import Adapter, adapters_of
from ..checkpoint import save_checkpoint
from ..conditioning import conditioner_of
from ..config import SoftREPAConfig
from ..objectives import Contrastive, Objective
from ..pipeline import denoiser_of
from .arguments import ContrastiveFlowMatchingArguments
from .calibration import (
    CALIBRATION_BATCHES,
    Measured,
    check_negatives,
    is_saturated,
    saturation_warning,
    unsaturated,
)
from .callbacks import (
    Callbacks,
    FlowCallback,
    NonfiniteCallback,
    RescueCallback,
    StopCallback,
    TrainerControl,
    TrainerState,
)
from .card import Data, ReportCallback, claim_repository, data_name, gain_text, push_report, write_report
from .checkpoints import Checkpoint, Checkpoints
from .data.cache import TensorCache
from .data.dataset import Example, Examples
from .data.encode import Encoder
from .data.loader import PairLoader
from .estimate import Estimate, estimate_run
from .log import LogCallback, ProgressCallback
from .metrics import Recent, gains, joined_rows, standard_errors, summary, tell_apart
from .optimization import MovingAverage, Schedule, make_optimizer
from .preflight import check_settings, open_checked, open_data
from .preparation import choose_adapter, make_framing, prepared
from .step.collate import NEGATIVES, Draws, PairCollator, spread_timesteps
from .step.engine import PairEngine
from .validation import ValidationCallback

logger = logging.getLogger(__name__)

_FP16_LOSS_SCALE = 2.0**14
_NO_GRADIENT = 1e-8  # of one number: what Adam adds to the size of the gradient that it divides by

ComputeMetrics = Callable[[Mapping[str, Tensor]], Mapping[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        step: Optimizer steps done.
        finished: False when it was asked to stop before its last step and is to go on another time.
        metrics: The last logged ones.
    """

    step: int
    finished: bool
    metrics: dict[str, float]


class ContrastiveFlowMatchingTrainer:
    """Trains the soft tokens of a pipeline by contrast; everything else of the pipeline stays frozen.

    Attributes:
        state: Where the run is; callbacks get it.
        warnings: What was said of the run; the model card tells it too.
        parameters: The tokens in training.
        loader: The training batches.
        engine: Runs the pairs.
        data_collator: Makes pairs of loaded examples.
        optimizer: Of the tokens.
        lr_scheduler: Their learning rate over steps.

    Args:
        pipeline: A text-to-image pipeline, loaded whole. Training moves it to its device and, in mixed precision, its
            models to half precision; when it has finished, the pipeline samples with the tokens that were saved.
        args: The settings.
        train_dataset: Images with captions, in any form that `open_examples` takes.
        eval_dataset: Held-out ones; with them the best adapter, by `metric_for_best_model`, is kept in
            `output_dir/best`.
        adapter_config: What to train; the family's published settings unless given. An active adapter that requires
            gradients (`add_softrepa`, or `load_softrepa(..., is_trainable=True)`) is trained on where neither this
            nor a name is given.
        adapter_name: The adapter to train, or the name of the new one.
        validation_metrics: Metrics of single pictures that score the validation pictures, as `evaluate` takes them.
        compute_metrics: Further figures of an evaluation. It gets those of every held-out image, (n,) each: `top1`,
            `margin`, `information` (NaN for images without a negative) and `timestep`.
        callbacks: Yours, called after the trainer's own; see `callbacks`.
        optimizers: Optimizer of the tokens and schedule of its rate, None for those of the settings.

    Raises:
        ValueError: The data, the settings and the pipeline do not fit together; nothing has been trained by then.
    """

    def __init__(
        self,
        pipeline: Any,
        args: ContrastiveFlowMatchingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        adapter_config: SoftREPAConfig | None = None,
        adapter_name: str | None = None,
        validation_metrics: Sequence[Any] = (),
        compute_metrics: ComputeMetrics | None = None,
        callbacks: Sequence[Any] = (),
        optimizers: tuple[Optimizer | None, Any] = (None, None),
    ) -> None:
        self.pipeline, self.args, self.compute_metrics = pipeline, args, compute_metrics
        check_settings(args)
        validation = ValidationCallback(validation_metrics)
        self.accelerator = Accelerator(log_with=args.report_to or None, project_dir=args.output_dir)
        self.conditioner = conditioner_of(pipeline, max_sequence_length=args.max_sequence_length)
        if args.gradient_checkpointing:
            self.conditioner.check_checkpointing()
        self.objective = self._given_objective = args.make_objective(self.conditioner.noising.prediction)
        self.framing = make_framing(args, self.conditioner)
        self.train_examples = open_checked(args, train_dataset)
        self._data = Data(self.train_examples.count, data_name(train_dataset), data_name(eval_dataset))
        self.eval_examples = None if eval_dataset is None else open_data(args, eval_dataset)
        if self.eval_examples is not None:
            self._make_loader(self.eval_examples, shuffle=False)  # too few of them show now, not after hours
        self.encoder = Encoder(args, self.conditioner, self.framing, self.accelerator.device)
        self.loader = self._make_loader(self.train_examples, latents=self.encoder.latents)
        self.adapter_name = choose_adapter(
            pipeline, args, adapter_config, adapter_name, num_banks=self.objective.num_banks
        )
        adapters = adapters_of(denoiser_of(pipeline))
        assert adapters is not None
        self._adapters = adapters
        self.parameters = list(self.adapter.tokens.parameters())
        self.engine = PairEngine(
            self.conditioner.predict,
            self.objective,
            self.parameters,
            use_bank=adapters.use_bank,
            ema=self.in_average,
            pair_chunk_size=args.pair_chunk_size,
            num_backward_negatives=args.num_backward_negatives,
            loss_scale=_FP16_LOSS_SCALE if args.mixed_precision == "fp16" else 1.0,
        )
        self.data_collator = PairCollator(args, self.encoder, self.conditioner.noising, self.accelerator)
        max_steps = self._count_steps()
        self.optimizer = optimizers[0] or make_optimizer(args, self.parameters)
        self.lr_scheduler = Schedule(args, self.optimizer, max_steps, given=optimizers[1])
        self.average = MovingAverage(self.parameters, args.ema_decay) if args.ema_decay else None
        self.checkpoints = Checkpoints(args.output_dir, args.checkpoints_total_limit)
        self.state = TrainerState(
            max_steps=max_steps,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            train_batch_size=args.train_batch_size,
            num_train_epochs=args.num_train_epochs,
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.control = TrainerControl()
        self._recent, self._nonfinite, self._began = Recent(), NonfiniteCallback(), 0.0
        self._last: dict[str, float] = {}
        self._evaluated: dict[str, Tensor] | None = None
        self._base_rows: dict[str, Tensor] | None = None
        self._position: dict[str, int] = {}
        self._whole, self._saved_step = True, 0
        self.warnings: list[str] = []
        self._logged: dict[str, float] = {}
        self._batches_per_epoch = None if self.train_examples.count is None else len(self.loader)
        self._first_row = self.accelerator.process_index * args.train_batch_size
        self._stop = StopCallback()
        own = (LogCallback(self.accelerator), ProgressCallback(), FlowCallback(), self._stop, RescueCallback())
        self.callbacks = Callbacks([*own, self._nonfinite, validation, ReportCallback(), *callbacks])
        self._given = {
            "trainer": self,
            "model": self.conditioner.denoiser,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "train_dataloader": self.loader,
        }

    @property
    def adapter(self) -> Adapter:
        """The adapter in training."""
        return self._adapters[self.adapter_name]

    @cached_property
    def _fingerprint(self) -> str:
        return self.train_examples.fingerprint()

    @property
    def finished(self) -> bool:
        """Whether the run is over, or only stopped to go on another time."""
        ended = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        return ended and not self.control.should_pause

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainingResult:
        """Trains to the last step, or until it is asked to stop, which saves a checkpoint first.

        Args:
            resume_from_checkpoint: A checkpoint folder, or `latest` or True for the newest one in `output_dir`; that
                of the settings unless given.

        Raises:
            FloatingPointError: The loss was NaN or infinite for `max_nonfinite_steps` steps in a row.
            OSError: A checkpoint could not be written; the earlier ones are untouched.
            ValueError: The checkpoint to resume from is of other settings, or output_dir has later ones.
        """
        self._place_tokens()
        if self.args.dry_run:
            self.accelerator.print(self.estimate())
            return TrainingResult(0, False, {})
        main = self.accelerator.is_main_process
        if self.args.push_to_hub and main:
            claim_repository(self.args)
        with self.checkpoints.locked() if main else nullcontext():
            self._resume("latest" if resume_from_checkpoint is True else resume_from_checkpoint or None)
            self._check_disk()
            self.control = TrainerControl()
            try:
                self._event("on_train_begin")
                with prepared(self.pipeline, self.args, self.accelerator.device):
                    self._run()
                self._event("on_train_end")
            except BaseException as error:
                self._event("on_exception", error=error)
                raise
        return TrainingResult(self.state.global_step, self.finished, self._logged)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Returns how well held-out captions are told apart: fixed images, noise and timesteps, so that runs compare.

        Args:
            eval_dataset: Images with captions; the trainer's held-out ones unless given.

        Raises:
            ValueError: There is no eval_dataset.
        """
        rows = []
        with self.in_average():
            for number, batch in zip(
                range(self.args.num_evaluation_batches), self.get_eval_dataloader(eval_dataset), strict=False
            ):
                total = self.accelerator.num_processes * len(batch)
                timestep = spread_timesteps(number, self._first_row, len(batch), total)
                pairs = self.data_collator(batch, Draws(self.args.validation_seed, number, self._first_row), timestep)
                rows.append(self._gathered(tell_apart(self.engine.errors(pairs), pairs)))
        joined = joined_rows(rows)
        self._evaluated = joined if eval_dataset is None else None
        further = self.compute_metrics(joined) if self.compute_metrics else {}
        return summary(rows) | standard_errors(joined) | dict(further)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PairLoader:
        """Returns the batches of held-out images, in their stored order; arguments and errors as `evaluate`."""
        examples = self.eval_examples if eval_dataset is None else open_data(self.args, eval_dataset)
        if examples is None:
            raise ValueError("evaluate needs an eval_dataset; give the trainer one")
        return self._make_loader(examples, shuffle=False)

    def log(self, logs: dict[str, float]) -> None:
        """Writes figures of the present step to `log.jsonl` and the trackers, by the callbacks of `on_log`."""
        self.state.log_history.append({"step": self.state.global_step, **logs})
        self._event("on_log", logs=logs)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Saves the trained adapter, its moving average if there is one, as `load_softrepa` reads it.

        Args:
            output_dir: The folder; `output_dir` of the settings unless given.
        """
        config = replace(self.adapter.config, num_banks=1, inference_mode=True)
        with self.in_average():
            tensors = dict(self.adapter.tokens.state_dict())
            if self.adapter.config.num_banks > 1:  # sampling reads the first bank alone
                tensors = {name: value[0] for name, value in tensors.items()}
            save_checkpoint(output_dir or self.args.output_dir, config, tensors)

    def write_report(self) -> None:
        """Writes settings, curves, pictures and the model card beside the adapter that `save_model` wrote."""
        captions = self.args.train_batch_size * self.accelerator.num_processes
        write_report(
            self.args,
            self._data,
            steps=self.state.global_step,
            num_captions=captions,
            objective=None if self.objective == self._given_objective else self.objective,
            warnings=self.warnings,
        )

    def push_to_hub(self) -> str:
        """Pushes the adapter in `output_dir` with its card, curves and pictures; returns the URL of the commit.

        Raises:
            OSError: The Hub refused; the folder is untouched.
        """
        return push_report(self.args)

    def estimate(self) -> Estimate:
        """Returns what the run will do and take; runs one pair, changes no token and writes nothing."""
        with prepared(self.pipeline, self.args, self.accelerator.device):
            return estimate_run(
                self.args,
                self.conditioner,
                self.objective,
                self.parameters,
                self.train_examples,
                sizes=self.framing.sizes,
                steps=self.state.max_steps,
                batches_per_epoch=self._batches_per_epoch,
                num_processes=self.accelerator.num_processes,
                device=self.accelerator.device,
            )

    def in_average(self) -> AbstractContextManager[None]:
        """Puts the moving average in the tokens' place while it lasts, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def warn(self, text: str) -> None:
        """Warns of something about the run; it is said again at its end, and in the model card."""
        self.warnings.append(text)
        with tqdm.external_write_mode():  # not in the line of the progress bar
            logger.warning("%s", text)

    def sum_up(self) -> None:
        """Says at the end of a run what was measured of it, and once more what was warned of."""
        norms = [entry["gradient_norm"] for entry in self.state.log_history if "gradient_norm" in entry]
        count = sum(parameter.numel() for parameter in self.parameters)
        if norms and max(norms) < _NO_GRADIENT * math.sqrt(count):
            self.warnings.append(
                f"the gradient's norm was {max(norms):.1g} at most, for {count:,} numbers: the tokens learned "
                "nothing; look at the temperature and at the captions"
            )
        for text in self.warnings:
            logger.warning("%s", text)
        for entry in [entry for entry in self.state.log_history if "held_out/top1" in entry][-1:]:
            logger.info("%s", " ".join(gain_text(entry)))

    def save_last_step(self) -> Path | None:
        """Saves the run as it was after the last whole step.

        Returns:
            The checkpoint; None if it is there already, or the run has no whole step.
        """
        if not self._whole or self.state.global_step in (0, self._saved_step):
            return None
        tokens = dict(self.adapter.tokens.state_dict())
        saved = self.checkpoints.save(self.state.global_step, self.adapter.config, tokens, self._state_dict())
        self._saved_step = self.state.global_step
        return saved

    # Set-up.

    def _make_loader(
        self, examples: Examples, *, shuffle: bool = True, latents: TensorCache | None = None
    ) -> PairLoader:
        return PairLoader(
            examples,
            self.framing,
            batch_size=self.args.train_batch_size,
            seed=self.args.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            shuffle=shuffle,
            max_broken=self.args.max_broken,
            num_workers=self.args.dataloader_num_workers,
            latents=latents,
        )

    def _count_steps(self) -> int:
        if self.args.max_steps is not None:
            return self.args.max_steps
        return max(1, len(self.loader) * self.args.num_train_epochs // self.args.gradient_accumulation_steps)

    def _place_tokens(self) -> None:
        """Puts the tokens where training takes place, the same in every process."""
        self.adapter.tokens.to(self.accelerator.device)
        for parameter in self.parameters:
            parameter.data.copy_(broadcast(parameter.data))
        if self.average is not None and self.state.global_step == 0:
            self.average = MovingAverage(self.parameters, self.args.ema_decay or 0.0)

    def _check_disk(self) -> None:
        """Refuses a run whose checkpoints would not fit: adapter, average and the two states of Adam, as a rule."""
        left = self.state.max_steps - self.state.global_step
        copies = 3 + (self.average is not None)
        each = copies * sum(parameter.nbytes for parameter in self.parameters) + 2**15
        self.checkpoints.check_room(each, -(-left // self.args.save_steps))

    def _calibrate(self) -> None:
        """Measures the first batches, and chooses an objective that teaches where the published one does not."""
        position, measured = self.loader.state_dict(), []
        batches = iter(self.loader)
        for number, batch in zip(range(CALIBRATION_BATCHES), batches, strict=False):
            pairs = self.data_collator(batch, Draws(self.args.seed, number, self._first_row))
            errors = self.engine.errors(pairs)
            rows = Measured.of(errors, pairs.positive, pairs.candidates)
            measured.append(Measured(**self._gathered(vars(rows))))
        batches.close()  # type: ignore[attr-defined]
        self.loader.load_state_dict(position)
        found = Measured.joined(measured)
        check_negatives(self.objective, found)
        if not isinstance(self.objective, Contrastive) or not is_saturated(self.objective, found):
            return
        if self.args.temperature is not None:
            self.warn(saturation_warning(self.objective, found))
            return
        chosen, text = unsaturated(self.objective, found)
        self.warn(text)
        self._choose(chosen)

    def _choose(self, objective: Objective) -> None:
        self.objective = self.engine.objective = objective

    # The loop.

    def _run(self) -> None:
        """Fills the caches and takes the steps that are left, or as many as there are until it is asked to stop."""
        self.encoder.fill(self.train_examples, self.accelerator, stop=lambda: self._stop.asked)
        self._stop.heed(self.control, self.accelerator)
        if self.control.should_training_stop:
            return
        if self.state.global_step == 0:
            self._calibrate()
        self._follow_control()
        for batches in self._steps():
            self._event("on_step_begin")
            self._train_step(batches)
            self._event("on_step_end")
            self._follow_control()
            if self.control.should_training_stop:
                return

    def _event(self, name: str, **given: Any) -> None:
        self.control = self.callbacks.call(name, self.args, self.state, self.control, **self._given, **given)

    def _follow_control(self) -> None:
        """Logs, evaluates and saves where callbacks asked for it; a run that stops is saved too."""
        if self.control.should_log:
            self.control.should_log = False
            token_norm = self.adapter.tokens.tokens.norm(dim=-1).mean().item()
            self._logged = self._recent.take() | self._last | {"token_norm": token_norm}
            self.log(self._logged)
        if self.control.should_evaluate:
            self.control.should_evaluate = False
            self._judge()
        if self.control.should_save or self.control.should_training_stop:
            self.control.should_save = False
            if self.accelerator.is_main_process:
                self.save_last_step()
            self.accelerator.wait_for_everyone()
            self._event("on_save")

    def _judge(self) -> None:
        """Evaluates held-out images, if there are some, and keeps the adapter if it is the best so far."""
        found = {} if self.eval_examples is None else self.evaluate()
        rows, self._evaluated = self._evaluated, None
        if self.state.global_step == 0:
            self._base_rows = rows
        elif rows and self._base_rows:
            found |= gains(rows, self._base_rows)
        if found:
            self.log({f"held_out/{name}": value for name, value in found.items()})
        self._event("on_evaluate", metrics={f"eval_{name}": value for name, value in found.items()})
        value, best = found.get(self.args.metric_for_best_model, math.nan), self.state.best_metric
        sign = 1 if self.args.greater_is_better else -1
        if self.state.global_step and math.isfinite(value) and (best is None or sign * value > sign * best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            if self.accelerator.is_main_process:
                self.save_model(Path(self.args.output_dir) / "best")

    def _steps(self) -> Iterator[list[list[Example]]]:
        """Yields the batches of each optimizer step, epoch after epoch."""
        group: list[list[Example]] = []
        self._began = time.perf_counter()
        while self.state.global_step < self.state.max_steps:
            self._event("on_epoch_begin")
            for batch in self.loader:
                group.append(batch)
                if len(group) == self.args.gradient_accumulation_steps:
                    yield group
                    group = []
                    self._began = time.perf_counter()
            self._event("on_epoch_end")

    def _train_step(self, batches: list[list[Example]]) -> None:
        """One optimizer step."""
        loss = torch.zeros((), device=self.accelerator.device)
        gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        rows, num_pairs, state = [], 0, self.state
        for number, batch in enumerate(batches):
            draws = Draws(self.args.seed, state.global_step * len(batches) + number, self._first_row)
            pairs = self.data_collator(batch, draws)
            done = self.engine.step(pairs, generator=draws.generators(1, NEGATIVES)[0])
            loss += done.loss / len(batches)
            for gradient, part in zip(gradients, done.gradients, strict=True):
                gradient += part / len(batches)
            rows.append(self._gathered(tell_apart(done.errors, pairs)))
            num_pairs += int((~done.errors.isnan()).sum()) * self.accelerator.num_processes
            self._event("on_substep_end", pairs=pairs, outcome=done)
        if self.accelerator.num_processes > 1:
            loss, *gradients = (self.accelerator.reduce(value, "mean") for value in (loss, *gradients))
        norm = torch.nn.utils.get_total_norm(gradients)
        self._last = {"gradient_norm": norm.item(), "learning_rate": self.lr_scheduler.rate}
        self._event("on_pre_optimizer_step", loss=loss.item(), gradient_norm=norm.item(), batches=batches)
        if self.control.should_skip_step:
            self.control.should_skip_step = False
        else:
            self._update(gradients, norm)
        state.global_step += 1
        self._whole, self._position = True, {"epoch": self.loader.epoch, "batches": self.loader.batches}
        epoch, batches_per_epoch = self.loader.epoch, self._batches_per_epoch
        state.epoch = epoch if batches_per_epoch is None else epoch + self.loader.batches / batches_per_epoch
        self._recent.add(loss.item(), rows, seconds=time.perf_counter() - self._began, num_pairs=num_pairs)

    def _update(self, gradients: list[Tensor], norm: Tensor) -> None:
        """Updates the tokens by gradients of this norm."""
        self._whole = False
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.args.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.args.max_grad_norm, norm)
        self.optimizer.step()
        self._event("on_optimizer_step")
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        if self.average is not None:
            self.average.update()

    def _gathered(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns per-row figures of all processes."""
        if self.accelerator.num_processes == 1:
            return rows
        gathered = self.accelerator.gather(torch.stack(list(rows.values()), dim=1))  # (rows, figures)
        return dict(zip(rows, gathered.unbind(1), strict=True))

    # Checkpoints.

    def _state_dict(self) -> dict[str, Any]:
        return {
            "settings": self.args.to_dict(),
            "step": self.state.global_step,
            "best": self.state.best_metric,
            "nonfinite_steps": self._nonfinite.in_a_row,
            "recent": self._recent.state_dict(),
            "loss_scale": self.engine.loss_scale,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_scheduler.state_dict(),
            "average": None if self.average is None else self.average.values,
            "data": self.loader.state_dict() | self._position | {"fingerprint": self._fingerprint},
            "objective": None if self.objective == self._given_objective else vars(self.objective),
            "base": self._base_rows,
            "warnings": self.warnings,
        }

    def _resume(self, given: str | None) -> None:
        """Goes back to the checkpoint that was named, if any."""
        wanted, step = given or self.args.resume_from_checkpoint, self.state.global_step
        checkpoint = None if wanted is None or step else self.checkpoints.read(wanted)
        if checkpoint is not None:
            self._go_to(checkpoint)
        elif wanted is not None and not step:
            logger.info("%s has no checkpoint yet: training starts from the beginning", self.args.output_dir)
        self.checkpoints.check_none_after(self.state.global_step)

    def _go_to(self, checkpoint: Checkpoint) -> None:
        checkpoint.check_settings(self.args.to_dict())
        state = checkpoint.state
        self.loader.load_state_dict(state["data"])
        saved = state["data"].get("fingerprint", self._fingerprint)  # none in checkpoints of earlier versions
        if saved != self._fingerprint:
            self.loader.load_state_dict({"epoch": 0, "batches": 0})
            raise ValueError(
                f"{checkpoint.path} was saved while training on other data (fingerprints {saved} and now "
                f"{self._fingerprint}); go on with the same images and captions, or start afresh in another output_dir"
            )
        self._adapters.swap(self.adapter_name, checkpoint.config, checkpoint.tensors)
        self.state.global_step, self.state.best_metric = state["step"], state["best"]
        self._nonfinite.in_a_row, self.engine.loss_scale = state["nonfinite_steps"], state["loss_scale"]
        self._saved_step, self._position = state["step"], {key: state["data"][key] for key in ("epoch", "batches")}
        self._base_rows, self.warnings = state.get("base"), list(state.get("warnings", ()))
        if state.get("objective"):
            self._choose(Contrastive(**state["objective"]))
        self._recent.load_state_dict(state["recent"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.values = [value.to(self.accelerator.device) for value in state["average"]]
        logger.info("resumed from %s", checkpoint.path)
