"""The changes that importing this package makes to diffusers' classes.

Every pipeline and model gets the methods of `SoftREPAMethods`. `save_pretrained` of a pipeline also saves its
adapters, in `softrepa/<component>/<name>/`, and `from_pretrained` loads them again. The pipeline's own files do not
contain the adapters, except for one entry of `model_index.json` whose name begins with an underscore; without this
package, diffusers ignores that entry.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import try_to_load_from_cache
from torch import nn

from . import pipeline
from .adapter import adapters_of
from .compat import ModularPipeline
from .files import parse_json
from .methods import SoftREPAMethods
from .quoting import one_line, quoted
from .weights import as_number, plain
from .wrapping import uncompiled

logger = logging.getLogger(__name__)

_FOLDER = "softrepa"
_INDEX_KEY = "_softrepa"
_MAX_INDEX_BYTES, _MOST_ADAPTERS = 1 << 22, 256


def install() -> None:
    """Adds the methods to diffusers' classes. A second call changes nothing."""
    if "load_softrepa" in vars(DiffusionPipeline):
        return
    pipelines: Any = DiffusionPipeline
    for cls in filter(None, (pipelines, ModularPipeline, ModelMixin)):
        SoftREPAMethods.register(cls)
        for name, method in vars(SoftREPAMethods).items():
            if not name.startswith("_"):
                setattr(cls, name, method)
    pipelines.save_pretrained = _saving_adapters(pipelines.save_pretrained)
    if ModularPipeline is not None:
        ModularPipeline.save_pretrained = _warning_of_adapters(ModularPipeline.save_pretrained)
    pipelines.from_pretrained = classmethod(_loading_adapters(pipelines.from_pretrained.__func__))


def _saving_adapters(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save_pretrained)
    def save(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        adapted = _adapted(self)
        if not adapted:
            return save_pretrained(self, save_directory, *args, **kwargs)
        for component, denoiser in adapted.items():
            for name in pipeline.get_softrepa_adapters(denoiser):
                pipeline.save_softrepa(denoiser, Path(save_directory) / _subfolder(component, name), name)
        config = self._internal_dict
        self.register_to_config(**{_INDEX_KEY: {name: _state(denoiser) for name, denoiser in adapted.items()}})
        try:
            return save_pretrained(self, save_directory, *args, **kwargs)
        finally:
            self._internal_dict = config

    return save


def _loading_adapters(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(from_pretrained)
    def load(cls: type, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        pipe = from_pretrained(cls, pretrained_model_name_or_path, **kwargs)
        _load_beside(pipe, pretrained_model_name_or_path, kwargs)
        return pipe

    return load


def _warning_of_adapters(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save_pretrained)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _adapted(self):
            logger.warning("a modular pipeline is saved without its soft-token adapters; use save_softrepa for them")
        return save_pretrained(self, *args, **kwargs)

    return save


def _adapted(pipe: Any) -> dict[str, nn.Module]:
    """Returns the components of a pipeline that have adapters, by name, without the wrapper of `torch.compile`."""
    modules = {name: uncompiled(part) for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    return {name: module for name, module in modules.items() if adapters_of(module) is not None}


def _subfolder(component: str, name: str) -> str:
    """Returns the folder of an adapter within that of the pipeline; the name is quoted so that it is a valid path."""
    safe = quote(name, safe=" ")
    return f"{_FOLDER}/{component}/{safe if safe.strip('.') else safe.replace('.', '%2E')}"


def _state(denoiser: nn.Module) -> dict[str, Any]:
    """Returns the entry of `model_index.json` for the adapters of a denoiser. Inactive adapters have weight None."""
    adapters = adapters_of(denoiser)
    if adapters is None:
        return {}
    state = adapters.state
    weights = {name: plain(state.weights[name]) if name in state.weights else None for name in state.adapters}
    branch = {} if state.guidance_branch == "both" else {"guidance_branch": state.guidance_branch}
    return {"enabled": state.enabled and not state.pauses, "weights": weights, **branch}


def _load_beside(pipe: Any, source: Any, kwargs: Mapping[str, Any]) -> None:
    """Loads the adapters that a pipeline was saved with, and logs a warning for each that cannot be loaded.

    The pipeline itself is loaded already and is returned in any case, so this function raises nothing.
    """
    try:
        index = _index_file(source, kwargs)
        saved = _saved_states(index) if index is not None else {}
    except Exception as error:  # files from elsewhere may hold anything
        logger.warning(
            "%s is loaded without its soft-token adapters, because their entry in its model index is damaged: %s",
            one_line(source),
            one_line(error, 400),
        )
        return
    if index is None or not saved:
        return
    hub = {key: kwargs[key] for key in ("token", "local_files_only", "cache_dir") if key in kwargs}
    if not Path(source).exists():
        hub["revision"] = index.parent.name  # the commit that the pipeline itself came from
    for component, state in saved.items():
        try:
            _load_component(pipe, source, component, _checked_state(state), hub)
        except Exception as error:
            logger.warning(
                "%s was saved with soft-token adapters for %s, which cannot be loaded: %s",
                one_line(source),
                quoted(component),
                one_line(error, 400),
            )


def _saved_states(index: Path) -> Mapping[str, Any]:
    """Returns the saved state of the adapters in a `model_index.json`, by component; empty if there are none.

    Raises:
        ValueError: The entry is not an object, or is too large.
    """
    with index.open("rb") as file:
        content = file.read(_MAX_INDEX_BYTES + 1)
    if f'"{_INDEX_KEY}"'.encode() not in content:  # the file is then not parsed at all
        return {}
    saved = parse_json(content, one_line(index), max_bytes=_MAX_INDEX_BYTES).get(_INDEX_KEY)
    if saved is None:
        return {}
    if not isinstance(saved, dict) or len(saved) > _MOST_ADAPTERS:
        raise ValueError(f"its entry {_INDEX_KEY} must be an object of components, but is {quoted(saved)}")
    return saved


def _checked_state(state: Any) -> dict[str, Any]:
    """Returns the saved state of one denoiser's adapters, checked to have the form that `_state` writes.

    Raises:
        ValueError: It has another form.
    """
    weights = state.get("weights") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not isinstance(state.get("enabled"), bool) or len(weights) > _MOST_ADAPTERS:
        raise ValueError(
            f'it must be written as {{"enabled": true, "weights": {{"name": 1.0}}}}, but is {quoted(state)}'
        )
    for name, weight in weights.items():
        parts = list(weight.values()) if isinstance(weight, dict) else weight if isinstance(weight, list) else [weight]
        for part in parts if weight is not None else ():
            as_number(part, f"the weight of {quoted(name)}")
    return state


def _load_component(pipe: Any, source: Any, component: str, state: Mapping[str, Any], hub: Mapping[str, Any]) -> None:
    """Loads the adapters of a denoiser and restores which are active; removes them again if that fails."""
    denoiser, weights = vars(pipe).get(component), state["weights"]
    before = {} if denoiser is None else _active(denoiser)
    loaded = [name for name in weights if _loads(denoiser, source, component, name, hub)]
    if not loaded:
        return
    try:
        active = {name: weights[name] for name in loaded if weights[name] is not None}
        pipeline.set_softrepa(denoiser, active, guidance_branch=state.get("guidance_branch", "both"))
        if not state["enabled"]:
            pipeline.disable_softrepa(denoiser)
    except Exception:
        if before:
            pipeline.delete_softrepa(denoiser, loaded)
            pipeline.set_softrepa(denoiser, before)
        else:
            pipeline.unload_softrepa(denoiser)
        raise


def _active(denoiser: Any) -> dict[str, float | None]:
    try:
        return pipeline.get_softrepa_adapters(denoiser)
    except (TypeError, ValueError):  # it is not a denoiser; loading has the better message
        return {}


def _loads(denoiser: Any, source: Any, component: str, name: str, hub: Mapping[str, Any]) -> bool:
    try:
        if not isinstance(denoiser, nn.Module):
            raise ValueError(f"the pipeline has no {one_line(component, 80)}")
        pipeline.load_softrepa(denoiser, source, adapter_name=name, subfolder=_subfolder(component, name), **hub)
    except Exception as error:
        logger.warning(
            "%s was saved with soft-token adapter %s, which cannot be loaded: %s",
            one_line(source),
            quoted(name),
            one_line(error, 400),
        )
        return False
    return True


def _index_file(source: Any, kwargs: Mapping[str, Any]) -> Path | None:
    """Returns the path of the `model_index.json` that a pipeline was just loaded from, or None."""
    if Path(source).exists():
        path = Path(source) / DiffusionPipeline.config_name
        return path if path.is_file() else None
    cached = try_to_load_from_cache(
        str(source),
        DiffusionPipeline.config_name,
        cache_dir=kwargs.get("cache_dir"),
        revision=kwargs.get("revision"),
    )
    return Path(cached) if isinstance(cached, str) else None
