"""Soft text tokens (SoftREPA) for frozen diffusers pipelines: load, weight, train, evaluate and share adapters.

Importing the package adds the methods `load_softrepa`, `set_softrepa`, `disable_softrepa`, `save_softrepa` and others
to every diffusers pipeline and model. The functions of the same names take the pipeline or denoiser as their first
argument.
"""

from typing import Any

from . import integration
from .config import SoftREPAConfig
from .families import FamilySpec, family_of, register_family, supported_denoisers
from .methods import SoftREPAMethods
from .pipeline import (
    add_softrepa,
    delete_softrepa,
    disable_softrepa,
    enable_softrepa,
    get_softrepa_adapters,
    load_softrepa,
    save_softrepa,
    set_softrepa,
    softrepa_disabled,
    softrepa_parameters,
    unload_softrepa,
)

__version__ = "0.1.0"

__all__ = [
    "ContrastiveFlowMatchingArguments",
    "ContrastiveFlowMatchingTrainer",
    "FamilySpec",
    "SoftREPAConfig",
    "SoftREPAMethods",
    "add_softrepa",
    "delete_softrepa",
    "disable_softrepa",
    "enable_softrepa",
    "evaluate",
    "family_of",
    "flow_edit",
    "get_softrepa_adapters",
    "invert",
    "load_prompts",
    "load_softrepa",
    "regenerate",
    "register_family",
    "save_softrepa",
    "set_softrepa",
    "softrepa_disabled",
    "softrepa_parameters",
    "supported_denoisers",
    "unload_softrepa",
]

integration.install()


def __getattr__(name: str) -> Any:
    """Imports training, editing and evaluation on first use, because loading an adapter does not need them."""
    if name in ("flow_edit", "invert", "regenerate"):
        from . import editing

        return getattr(editing, name)
    if name in ("ContrastiveFlowMatchingArguments", "ContrastiveFlowMatchingTrainer"):
        from . import training

        return getattr(training, name)
    if name in ("evaluate", "load_prompts"):
        from . import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
