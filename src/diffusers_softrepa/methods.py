"""The verbs as methods, made from the functions in `pipeline`.

`integration.install` adds these methods to diffusers' classes when the package is imported. Type checkers do not see
methods that are added at run time, but they do narrow types: every pipeline and model is an instance of
`SoftREPAMethods`, so after an `isinstance` check a type checker or editor knows the methods of both classes.

    assert isinstance(pipe, SoftREPAMethods)
    pipe.load_softrepa("user/softrepa-sd3")
"""

import functools
import inspect
import re
from abc import ABC
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from . import pipeline

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def _method(function: Callable[Concatenate[Any, _Rest], _Result]) -> Callable[Concatenate[Any, _Rest], _Result]:
    """Returns a function as a method: `self` in place of the first parameter, which the docstring leaves out."""

    @functools.wraps(function)
    def method(self: Any, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        return function(self, *args, **kwargs)

    signature = inspect.signature(function)
    target, *rest = signature.parameters.values()
    method.__signature__ = signature.replace(parameters=[target.replace(name="self"), *rest])  # type: ignore[attr-defined]
    method.__doc__ = _without_argument(inspect.getdoc(function) or "", target.name)
    return method


def _without_argument(doc: str, name: str) -> str:
    """Returns a Google-style docstring without the entry of one argument, nor an `Args:` section left empty."""
    doc = re.sub(rf"^ {{4}}{name}: .*\n?(?: {{5,}}.*\n?)*", "", doc, flags=re.MULTILINE)
    return re.sub(r"\n*Args:\n(?! {4})", "\n", doc).rstrip()


class SoftREPAMethods(ABC):  # noqa: B024  (ABC for `register`)
    """The methods that this package adds to every diffusers pipeline and model, all of which count as instances.

    Each method is the function of the same name in `diffusers_softrepa`, called with the pipeline or model as its
    first argument. The class is for `isinstance` and annotations; it is not a base class to derive from.
    """

    load_softrepa = _method(pipeline.load_softrepa)
    add_softrepa = _method(pipeline.add_softrepa)
    save_softrepa = _method(pipeline.save_softrepa)
    set_softrepa = _method(pipeline.set_softrepa)
    enable_softrepa = _method(pipeline.enable_softrepa)
    disable_softrepa = _method(pipeline.disable_softrepa)
    softrepa_disabled = _method(pipeline.softrepa_disabled)
    delete_softrepa = _method(pipeline.delete_softrepa)
    unload_softrepa = _method(pipeline.unload_softrepa)
    get_softrepa_adapters = _method(pipeline.get_softrepa_adapters)
    softrepa_parameters = _method(pipeline.softrepa_parameters)

    if TYPE_CHECKING:
        # An object of unknown type is narrowed to this class alone. What else it has stays unknown, not an error.
        def __getattr__(self, name: str) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
