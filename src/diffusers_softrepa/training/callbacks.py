"""Callbacks with the events of transformers' `TrainerCallback`.

Every event is called with `(args, state, control, **given)`. `state` is a `TrainerState` (`global_step`, `max_steps`,
`epoch`, `best_metric`, `log_history`), `control` holds what the trainer does next, and `given` always holds
`trainer`, `model` (the denoiser), `optimizer`, `lr_scheduler` and `train_dataloader`, and in addition:

- `on_train_begin`: before captions or images are encoded; `on_train_end`: after the last step, or when the run stops
- `on_epoch_begin`, `on_epoch_end`, `on_step_begin`, `on_step_end`
- `on_substep_end`: `pairs` (`PairBatch`) and `outcome` (`PairStep`) of one of the batches of the step
- `on_pre_optimizer_step`: `loss`, `gradient_norm` and `batches`; `on_optimizer_step`: the tokens are new
- `on_log`: `logs`; `on_evaluate`: `metrics`; `on_save`: after a checkpoint was written
- `on_exception`: `error`, which ends the run; only callbacks that define it are called

The trainer's own callbacks come first: `LogCallback` (module `log`), `ProgressCallback`, `FlowCallback`,
`StopCallback`, `RescueCallback`, `NonfiniteCallback`, `ValidationCallback` (`validation`), `ReportCallback` (`card`).
"""

import json
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState
from transformers import TrainerControl as _TrainerControl

from ..files import write_whole

__all__ = ["Callbacks", "FlowCallback", "StopCallback", "TrainerCallback", "TrainerControl", "TrainerState"]

logger = logging.getLogger(__name__)

_SHOWN = ("loss", "top1", "pairs_per_second")  # beside the progress bar


@dataclass
class TrainerControl(_TrainerControl):
    """What the trainer does next: transformers' `should_log`, `should_evaluate`, ..., and two more.

    Attributes:
        should_skip_step: Whether this step leaves the tokens unchanged.
        should_pause: With `should_training_stop`, whether the run will be resumed, so that nothing is reported or
            pushed yet.
    """

    should_skip_step: bool = False
    should_pause: bool = False


@final
class Callbacks:
    """Calls callbacks in their order.

    Args:
        callbacks: Callbacks, or callback classes without arguments.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]

    def call(self, event: str, args: Any, state: TrainerState, control: Any, **given: Any) -> TrainerControl:
        """Calls an event and returns the control, which a callback may replace.

        An error in `on_exception` is a warning, so that every callback is called and the first error is raised.
        """
        for callback in self.callbacks:
            method = getattr(callback, event, None)  # a callback written for transformers has no `on_exception`
            try:
                control = (method(args, state, control, **given) if method else None) or control
            except Exception as error:
                if event != "on_exception":
                    raise
                logger.warning("%s failed after the error that ends the run: %s", type(callback).__name__, error)
        return control


@final
class FlowCallback(TrainerCallback):
    """Logs, evaluates, saves and stops at the steps of the settings."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        control.should_evaluate = state.global_step == 0

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        control.should_log = last or step % args.logging_steps == 0
        control.should_evaluate = last or step % args.eval_steps == 0
        control.should_save = last or step % args.save_steps == 0
        control.should_training_stop = last


@final
class ProgressCallback(TrainerCallback):
    """Shows a progress bar on stderr, in the main process."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="soft tokens",
            disable=not state.is_world_process_zero,
            file=sys.stderr,
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._bar.update()

    def on_log(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        shown = {name: f"{given['logs'][name]:.3g}" for name in _SHOWN if name in given["logs"]}
        if shown and self._bar is not None:
            self._bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_train_end


@final
class StopCallback(TrainerCallback):
    """Stops and saves the run after the present step on SIGTERM, SIGINT or SIGHUP; a second SIGINT stops at once.

    Signals that the program ignores (`nohup`) stay ignored, and signals reach the main thread only.

    Attributes:
        asked: Whether this process got a signal.
    """

    def __init__(self) -> None:
        self.asked = self._interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes signals inside the block, which holds the whole run: a signal does not break off its report either."""
        self.asked = self._interrupted = False
        former: dict[int, Any] = {}
        main = threading.main_thread()
        try:
            for name in ("SIGTERM", "SIGINT", "SIGHUP") if threading.current_thread() is main else ():
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    former[number] = signal.signal(number, self._note)
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        self.stop_if_asked(control, given["trainer"].accelerator)

    def stop_if_asked(self, control: Any, accelerator: Any) -> None:
        """Stops the run, to be resumed later, if any process got a signal."""
        asked = torch.tensor([int(self.asked)], device=accelerator.device)
        if accelerator.gather(asked).any() and not control.should_training_stop:
            control.should_training_stop = control.should_pause = True

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self.asked, self._interrupted = True, self._interrupted or number == signal.SIGINT


@final
class RescueCallback(TrainerCallback):
    """Saves the last complete step when an `Exception` ends the run; a second SIGINT raises none and saves nothing."""

    def on_exception(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        trainer, error = given["trainer"], given["error"]
        if not isinstance(error, Exception) or not state.is_world_process_zero:
            return
        if (saved := trainer.save_last_step()) is not None:
            logger.warning("the run ended in an error; step %d is saved in %s", state.global_step, saved)


@final
class NonfiniteCallback(TrainerCallback):
    """Skips steps with a NaN or infinite loss or gradient, writes their batches to a file, and stops after too many.

    Where float16 gradients overflow, the loss scale is halved instead.

    Attributes:
        in_a_row: Steps that were skipped since the last finite one; checkpoints hold it.
    """

    def __init__(self) -> None:
        self.in_a_row = 0

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        """Skips the step where its loss or gradient is not finite.

        Raises:
            FloatingPointError: It was the step number `max_nonfinite_steps` in a row.
        """
        loss, gradient_norm = given["loss"], given["gradient_norm"]
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.in_a_row = 0
            return
        control.should_skip_step = True
        trainer, step = given["trainer"], state.global_step
        if math.isfinite(loss) and trainer.engine.loss_scale > 1:
            trainer.engine.loss_scale /= 2
            return
        self.in_a_row += 1
        report = Path(args.output_dir) / f"nonfinite-step-{step}-rank-{trainer.accelerator.process_index}.json"
        entries = [
            {"example": row.name, "caption": row.caption, "negative_captions": row.negative_captions}
            for batch in given["batches"]
            for row in batch
        ]
        found = {"step": step, "loss": str(loss), "gradient_norm": str(gradient_norm), "batch": entries}
        report.parent.mkdir(parents=True, exist_ok=True)
        write_whole(report, json.dumps(found, indent=2))
        logger.warning(
            "step %d is skipped: its loss is %s, the norm of its gradient %s; its batch is in %s",
            *(step, loss, gradient_norm, report),
        )
        if self.in_a_row >= args.max_nonfinite_steps:
            raise FloatingPointError(
                f"loss or gradient were not finite for {self.in_a_row} steps in a row, the last one step {step}: see "
                f"{report}; lower learning_rate, set max_grad_norm, or use mixed_precision='no' or 'bf16'"
            )
