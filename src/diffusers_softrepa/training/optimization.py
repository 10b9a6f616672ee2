"""Optimizer, learning-rate schedule and moving average of the tokens, from the run's settings."""

import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from ..checkpoint import LARGEST
from ..files import parse_json
from ..quoting import one_line
from .arguments import ContrastiveFlowMatchingArguments


def make_optimizer(args: ContrastiveFlowMatchingArguments, parameters: Sequence[Parameter]) -> Optimizer:
    """Returns the optimizer that the settings name, in training mode.

    Raises:
        ValueError: There is no such class, its package is not installed, or it does not accept these arguments.
    """
    short = _SHORT_NAMES.get(args.optim.lower().replace("-", "_"))
    module, _, name = (short or args.optim).rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module or "torch.optim"), name if module else _class_name(name))
        if Optimizer not in inspect.getmro(cls):
            raise TypeError(f"{name} is no optimizer class")
        if inspect.signature(cls.step).parameters["closure"].default is inspect.Parameter.empty:
            raise TypeError(f"{name} computes losses of its own, which training does not hand out")
        optimizer = cls(parameters, lr=args.learning_rate, **parse_json(args.optim_args, "optim_args"))
        if is_schedule_free(optimizer):
            if args.ema_decay is not None:
                raise ValueError("a schedule-free optimizer averages the tokens itself; leave out ema_decay")
            optimizer.train()
        return optimizer
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(module.split(".")[0], module.split(".")[0])
        raise ValueError(
            f"optim={args.optim!r} needs a package that is not installed ({error}); pip install {package}, or name a "
            "class of torch.optim"
        ) from error
    except Exception as error:  # whatever the optimizers raise
        raise ValueError(
            f"optim={args.optim!r} with optim_args={args.optim_args!r} makes no optimizer: "
            f"{error}; name a class of torch.optim, or package.module.Class of an installed package"
        ) from error


def check_optimizer(args: ContrastiveFlowMatchingArguments, device: torch.device) -> None:
    """Takes a step with optimizer and schedule of the settings, on two numbers of which one has a gradient.

    Raises:
        ValueError: They cannot be made, or cannot take this step, or it leaves a number that no adapter can hold.
    """
    trial = Parameter(torch.ones(1, 1, 2, device=device))
    trial.grad = torch.tensor([[[1.0, 0.0]]], device=device)
    optimizer = make_optimizer(args, [trial])
    Schedule(args, optimizer, args.max_steps or 1)
    told = f"optim={args.optim!r} with learning_rate={args.learning_rate} and optim_args={args.optim_args!r}"
    try:
        optimizer.step()
        if not trial.abs().max() <= LARGEST:  # nor NaN
            raise ValueError(f"a step makes {trial.flatten().tolist()} of ones")
    except Exception as error:  # whatever the optimizers raise
        raise ValueError(
            f"{told} cannot train tokens: {one_line(error)}; lower the numbers, or name another optimizer"
        ) from error


# Short names of transformers and kohya's scripts -> classes of packages to install.
_SHORT_NAMES = {
    "prodigy": "prodigyopt.Prodigy",
    "schedule_free": "schedulefree.AdamWScheduleFree",
    "schedule_free_adamw": "schedulefree.AdamWScheduleFree",
    "adamw_schedule_free": "schedulefree.AdamWScheduleFree",
    "schedule_free_radam": "schedulefree.RAdamScheduleFree",
    "schedule_free_sgd": "schedulefree.SGDScheduleFree",
    "8bit": "bitsandbytes.optim.AdamW8bit",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adamw_bnb_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "lion": "lion_pytorch.Lion",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "lion_8bit": "bitsandbytes.optim.Lion8bit",
    "dadapt_adam": "dadaptation.DAdaptAdam",
    "came": "came_pytorch.CAME",
}
_PACKAGES = {"lion_pytorch": "lion-pytorch", "came_pytorch": "came-pytorch"}


def is_schedule_free(optimizer: Any) -> bool:
    """Returns whether an optimizer keeps an average of its own, which its `eval()` gives the parameters."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def _class_name(name: str) -> str:
    """Returns the name of a class of torch.optim, also for the spelling of transformers, `adamw_torch`."""
    known = {key.lower(): key for key, value in vars(torch.optim).items() if isinstance(value, type)}
    return known.get(name.lower().removesuffix("_fused").removesuffix("_torch"), name)


class Schedule:
    """The learning rate over optimizer steps; skipped steps do not count.

    Args:
        args: The settings. `warm_restarts` is SoftREPA's cosine with restarts, updated every `lr_update_steps` steps.
        optimizer: The optimizer whose rate it sets.
        max_steps: Optimizer steps of the whole run.
        given: A schedule of torch to use instead, updated at every step; defaults to None.

    Raises:
        ValueError: diffusers has no schedule of that name, or needs more than these settings for it.
    """

    def __init__(
        self, args: ContrastiveFlowMatchingArguments, optimizer: Optimizer, max_steps: int, *, given: Any = None
    ) -> None:
        self._steps, self._every = 0, 1
        if given is not None:
            self._schedule: Any = given
        elif args.lr_scheduler == "warm_restarts":
            self._every = args.lr_update_steps
            self._schedule = CosineAnnealingWarmRestarts(optimizer, T_0=args.lr_restart_period, eta_min=args.lr_floor)
        else:
            try:
                self._schedule = get_scheduler(
                    args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_steps
                )
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"lr_scheduler={args.lr_scheduler!r} makes no schedule: {error}; choose warm_restarts, constant, "
                    "constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial"
                ) from error

    @property
    def rate(self) -> float:
        """The learning rate now."""
        return self._schedule.get_last_lr()[0]

    def step(self) -> None:
        """Moves on after a step of the optimizer."""
        self._steps += 1
        if self._steps % self._every == 0:
            self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        self._schedule.load_state_dict(state["schedule"])


@final
class TokenAverage:
    """The average of the tokens that is evaluated and saved in their place.

    Attributes:
        values: The exponential moving average, one tensor for each parameter; empty where the optimizer keeps it.

    Args:
        parameters: The tokens in training.
        decay: Share of the former average that is kept at each step, in (0, 1).
        optimizer: A schedule-free optimizer, whose own average is used instead.
    """

    def __init__(self, parameters: Sequence[Parameter], *, decay: float = 0.0, optimizer: Any = None) -> None:
        self._parameters, self._decay, self._optimizer = list(parameters), decay, optimizer
        self.values: list[Tensor] = (
            [] if optimizer is not None else [parameter.detach().clone() for parameter in parameters]
        )

    @torch.no_grad()
    def update(self) -> None:
        """Adds the present values of the tokens to the average; a schedule-free optimizer has done that already."""
        for value, parameter in zip(self.values, self._parameters, strict=False):
            value.lerp_(parameter, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the tokens the averaged values inside the block, and afterwards their own again, bit for bit."""
        live = [parameter.detach().clone() for parameter in self._parameters]
        self.make_final()
        try:
            yield
        finally:
            if self._optimizer is not None:
                self._optimizer.train()
            self._put(live)  # a schedule-free optimizer computes them back, which rounds

    def make_final(self) -> None:
        """Gives the tokens the averaged values for good."""
        if self._optimizer is not None:
            self._optimizer.eval()
        else:
            self._put(self.values)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def make_average(
    args: ContrastiveFlowMatchingArguments, optimizer: Optimizer, parameters: Sequence[Parameter]
) -> TokenAverage | None:
    """Returns the average of the tokens that the settings or a schedule-free optimizer ask for, None without one."""
    if is_schedule_free(optimizer):
        return TokenAverage(parameters, optimizer=optimizer)
    return TokenAverage(parameters, decay=args.ema_decay) if args.ema_decay else None
