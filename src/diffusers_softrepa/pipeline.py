"""Functions that load, add, weight, save and remove soft-token adapters of a pipeline or of a denoiser.

The first argument of each function is the target: a pipeline, or a denoiser alone. Importing `diffusers_softrepa` adds
the same functions as methods to every diffusers pipeline and model. An adapter belongs to the denoiser, so pipelines
that share a denoiser share its adapters.

A pipeline with several denoisers (Wan 2.2, Ideogram 4) has one adapter per denoiser under one name. A function called
with the pipeline acts on each of its denoisers. On disk each of these adapters is in a subfolder that has the name of
the pipeline component.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Adapters, adapters_of, attach, changing, detach, make_adapter
from .branches import GuidanceBranch, checked_branch
from .card import model_card
from .checkpoint import load_checkpoint, save_checkpoint, write_card
from .config import SoftREPAConfig
from .denoisers import denoiser_of as denoiser_of
from .denoisers import denoisers_of
from .files import check_places
from .hub import CARD_NAME, UNKNOWN_REPO, HubOptions, is_absent, push_folder
from .hub_ids import hub_id
from .quoting import quoted
from .weights import listed_names, plain, weights_by_name

logger = logging.getLogger(__name__)

DEFAULT_NAME = "softrepa"


def load_softrepa(
    target: Any,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    adapter_name: str | None = None,
    *,
    config: SoftREPAConfig | None = None,
    hotswap: bool = False,
    is_trainable: bool = False,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    proxies: Mapping[str, str] | None = None,
    use_safetensors: bool | None = None,
) -> str:
    """Loads an adapter and makes it the only active adapter. If loading fails, nothing is changed.

    Args:
        target: A pipeline or a denoiser.
        source: A Hub repository id or URL, a local folder, a safetensors file, or a state dict. For a pipeline with
            several denoisers: a repository or folder that has a subfolder per pipeline component, or a dict that maps
            component names to state dicts. A component that is missing there gets no adapter.
        adapter_name: Name of the adapter in this pipeline. Defaults to `"softrepa"`, or the first free name of
            `"softrepa_1"`, `"softrepa_2"`, ...
        config: Configuration of the adapter. Required if `source` is a state dict; otherwise it replaces the
            configuration stored beside the weights, which is used by default.
        hotswap: Whether to copy the values into the adapter `adapter_name`, which must be loaded already and have the
            same shapes. Compiled code stays valid. Defaults to False.
        is_trainable: Whether the parameters of the adapter require gradients. Defaults to False.
        weight_name: Name of the weights file. Defaults to `adapter_model.safetensors`.
        subfolder: Subfolder of the repository or folder in which the adapter is. Defaults to its root.
        revision: Branch, tag or commit on the Hub. Defaults to the main branch.
        token: Hub token, or whether to use the stored one. Defaults to the stored one, if there is one.
        local_files_only: Whether to read from the Hub cache only. Defaults to False.
        cache_dir: Folder of the Hub cache. Defaults to that of huggingface_hub.
        force_download: Whether to download files that are in the cache. Defaults to False.
        proxies: Not supported, because huggingface_hub no longer takes it; set the HTTPS_PROXY variable.
        use_safetensors: None or True. Adapters are always safetensors files.

    Returns:
        The name of the adapter.

    Raises:
        ValueError: The adapter is damaged or does not fit the denoiser, or the name is in use.
        OSError: The source cannot be found or reached.
        TypeError: An argument has the wrong type or an unknown name.
    """
    if isinstance(adapter_name, SoftREPAConfig):
        raise TypeError(
            "adapter_name must be a string, but is a SoftREPAConfig; give the config by keyword: config=..."
        )
    _check_config(config)
    if use_safetensors is False:
        raise ValueError("adapters are safetensors files only; leave use_safetensors out")
    if proxies is not None:
        raise ValueError("huggingface_hub takes no proxies argument any more; set the HTTPS_PROXY variable instead")
    denoisers = denoisers_of(target)
    name = _free_name(_names(denoisers), adapter_name, taken_is_fine=hotswap)
    options = HubOptions(weight_name, subfolder, revision, token, bool(local_files_only), cache_dir, force_download)
    parts = _parts(target, denoisers, source, options)
    loaded = {}
    for component, (part, part_options) in parts.items():
        own_config, tensors = load_checkpoint(part, config, part_options)
        loaded[component] = make_adapter(denoisers[component], own_config, tensors=tensors, trainable=is_trainable)
        _warn_of_other_base(target, own_config)
    with changing(denoisers.values(), numbers_of=name if hotswap else None):
        name = _free_name(
            _names(denoisers), name if hotswap else adapter_name, taken_is_fine=hotswap
        )  # another thread may have changed the names
        if hotswap:
            for component, adapter in loaded.items():
                _loaded(denoisers[component]).check_swap(name, adapter.config)
        for component, adapter in loaded.items():
            _put(denoisers[component], name, adapter, hotswap=hotswap)
    return name


def add_softrepa(
    target: Any,
    config: SoftREPAConfig | None = None,
    adapter_name: str | None = None,
    *,
    text_embeddings: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> str:
    """Adds a newly initialised adapter, which requires gradients, and makes it the only active adapter.

    Args:
        target: A pipeline or a denoiser.
        config: Configuration of the adapter. Defaults to `SoftREPAConfig.for_denoiser(denoiser)`.
        adapter_name: Name of the adapter. Defaults to `"softrepa"`, or the first free name of `"softrepa_1"`,
            `"softrepa_2"`, ...
        text_embeddings: (S, D) floating. Embeddings of S text tokens as the blocks read them; soft token k starts from
            row k modulo S. Required if `config.init` is `"text"`, an error otherwise.
        generator: Random generator of the initial values. Defaults to torch's global one.

    Returns:
        The name of the adapter. `softrepa_parameters` returns its parameters.

    Raises:
        ValueError: The configuration does not fit the denoiser, or the name is in use.
        TypeError: An argument has the wrong type.
    """
    _check_config(config)
    denoisers = denoisers_of(target)
    _free_name(_names(denoisers), adapter_name)
    fresh = {}
    for component, denoiser in denoisers.items():
        own = config or SoftREPAConfig.for_denoiser(denoiser)
        if own.base_model_name_or_path is None:
            own = replace(own, base_model_name_or_path=_base_name(target))
        fresh[component] = make_adapter(
            denoiser, own, text_embeddings=text_embeddings, generator=generator, trainable=True
        )
    with changing(denoisers.values()):
        name = _free_name(_names(denoisers), adapter_name)  # another thread may have changed the names
        for component, adapter in fresh.items():
            attach(denoisers[component], name, adapter)
    return name


def save_softrepa(
    target: Any,
    save_directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    weight_name: str | None = None,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    license: str | None = None,
) -> str | None:
    """Saves one adapter to a folder that `load_softrepa` reads, and optionally pushes the folder to the Hub.

    Args:
        target: A pipeline or a denoiser.
        save_directory: Folder for the weights, the configuration and a model card. A model card that is there already
            is kept.
        adapter_name: Name of the adapter. Defaults to the only loaded or only active adapter; required if there are
            several.
        weight_name: Name of the weights file. Defaults to `adapter_model.safetensors`.
        is_main_process: Whether this process saves. Set it to False in the other processes of a distributed run.
            Defaults to True.
        push_to_hub: Whether to push the saved files to the Hub. Defaults to False.
        repo_id: Hub repository to push to. Defaults to the name of the folder in your namespace.
        private: Whether a newly created repository is private. Defaults to the setting of the account on the Hub.
        token: Hub token, or whether to use the stored one. Defaults to the stored one.
        commit_message: Message of the commit. Defaults to one that names the upload.
        create_pr: Whether to open a pull request instead of committing. Defaults to False.
        revision: Branch to commit to. Defaults to the main branch.
        license: Licence for the model card as the Hub spells it, such as `"apache-2.0"`. Defaults to the licence that
            the model card has already, if any.

    Returns:
        The URL of the commit or pull request on the Hub, or None if nothing was pushed.

    Raises:
        ValueError: There is no such adapter, or `adapter_name` is required.
        OSError: The files cannot be written, or the Hub refused them.
    """
    denoisers = denoisers_of(target)
    name = adapter_name or _only_name(target)
    chosen = {component: adapters[name] for component, adapters in _having(target, [name]).items()}
    if not is_main_process:
        return None
    if len(denoisers) > 1:
        check_places(save_directory, [CARD_NAME], chosen, what="the place of an adapter")
    files = []
    for component, adapter in chosen.items():
        tensors = dict(adapter.tokens.state_dict())
        if len(denoisers) == 1:
            files = save_checkpoint(save_directory, adapter.config, tensors, weight_name=weight_name, license=license)
        else:
            made = save_checkpoint(Path(save_directory) / component, adapter.config, tensors, weight_name=weight_name)
            files += [f"{component}/{file}" for file in made if file != CARD_NAME]
    if len(denoisers) > 1:
        config = next(iter(chosen.values())).config
        write_card(
            Path(save_directory), str(model_card(config, UNKNOWN_REPO, weight_name=weight_name, license=license))
        )
        files.append(CARD_NAME)
    if not push_to_hub:
        return None
    directory = Path(save_directory)
    url = push_folder(
        directory,
        repo_id or directory.resolve().name,
        files,
        private=private,
        token=token,
        commit_message=commit_message,
        create_pr=create_pr,
        revision=revision,
    )
    logger.info("pushed the adapter: %s", url)
    return url


def set_softrepa(
    target: Any,
    adapter_names: str | Sequence[str] | Mapping[str, Any],
    adapter_weights: Any = None,
    *,
    guidance_branch: GuidanceBranch = "both",
) -> None:
    """Activates the named adapters with the given weights and deactivates all others.

    With weight 0 the output equals that of the base model bit for bit; with weight 1 the adapter acts as it was
    trained. In between, the output of each block is interpolated linearly. The tokens of several active adapters stand
    side by side. A denoiser of the pipeline that has none of the named adapters has no active adapter afterwards.

    A weight is a number, or one number per layer of tokens (a list, or `{layer: number}`), or one number per stage of
    a UNet (`{"down": 0.5}`). Layers and stages that a mapping omits have weight 1.

    Args:
        target: A pipeline or a denoiser.
        adapter_names: One name, several names, or a mapping from names to weights as `get_softrepa_adapters` returns
            it. In a mapping, None means that the adapter is not active.
        adapter_weights: One weight for all adapters, or a list with one weight per adapter. Defaults to 1. With a
            single name a list has one weight per layer.
        guidance_branch: `"both"` adds the tokens to every denoiser call, as published. With `"positive"`, under
            classifier-free guidance, only the rows of the positive prompt get them, and the prediction of the negative
            prompt is that of the base model; a call in which the rows cannot be told apart raises a ValueError.
            Defaults to `"both"`.

    Raises:
        ValueError: A name is unknown, there is not one weight per name, a weight is not a finite number or does not
            fit the layers of the adapter, or `guidance_branch` is another word. Nothing is changed then.
        TypeError: A name is not a string, or weights are given in addition to a mapping.
    """
    branch = checked_branch(guidance_branch)
    chosen = weights_by_name(adapter_names, adapter_weights)
    with changing(denoisers_of(target).values()):
        _having(
            target, [*chosen, *(adapter_names if isinstance(adapter_names, Mapping) else [])]
        )  # raises if one is unknown
        states = [
            (adapters, adapters.weighed({name: chosen[name] for name in chosen if name in adapters.names}, branch))
            for adapters in _having(target).values()
        ]
        for adapters, state in states:
            adapters.become(state)


def enable_softrepa(target: Any) -> None:
    """Enables the active adapters again after `disable_softrepa`.

    Args:
        target: A pipeline or a denoiser.

    Raises:
        ValueError: There are no adapters.
    """
    with changing(denoisers_of(target).values()):
        for adapters in _having(target).values():
            adapters.set_enabled(True)


def disable_softrepa(target: Any) -> None:
    """Disables all adapters until `enable_softrepa`. Outputs then equal those of the base model bit for bit.

    Args:
        target: A pipeline or a denoiser.

    Raises:
        ValueError: There are no adapters.
    """
    with changing(denoisers_of(target).values()):
        for adapters in _having(target).values():
            adapters.set_enabled(False)


@contextmanager
def softrepa_disabled(target: Any) -> Iterator[None]:
    """Context manager that disables all adapters inside its block and restores the previous state afterwards.

    Contexts may be nested, and may overlap in several threads: adapters are enabled again when the last context ends.
    Without adapters the context does nothing. An adapter that is loaded inside the block into a denoiser that had none
    is enabled.

    Args:
        target: A pipeline or a denoiser.
    """
    denoisers = list(denoisers_of(target).values())
    paused = []
    with changing(denoisers):
        for denoiser in denoisers:
            adapters = adapters_of(denoiser)
            if adapters is not None:
                adapters.pause(1)
                paused.append((denoiser, adapters))
    try:
        yield
    finally:
        with changing(denoisers):
            for denoiser, adapters in paused:
                if adapters_of(denoiser) is adapters:  # not if it was unloaded in the block
                    adapters.pause(-1)


@contextmanager
def softrepa_left_as_found(target: Any) -> Iterator[None]:
    """Context manager that restores which adapters are active and enabled, and their weights, when its block ends.

    Adapters that are loaded or removed inside the block stay loaded or removed.

    Args:
        target: A pipeline or a denoiser.
    """
    denoisers = list(denoisers_of(target).values())
    found = [(denoiser, adapters.state) for denoiser in denoisers if (adapters := adapters_of(denoiser)) is not None]
    try:
        yield
    finally:
        with changing(denoisers):
            for denoiser, state in found:
                adapters = adapters_of(denoiser)
                if adapters is not None:
                    here = {name: weight for name, weight in state.weights.items() if name in adapters.names}
                    branch = state.guidance_branch
                    adapters.become(
                        replace(adapters.state, weights=here, guidance_branch=branch, enabled=state.enabled)
                    )


def delete_softrepa(target: Any, adapter_names: str | Sequence[str]) -> None:
    """Removes the named adapters. No other adapter becomes active in their place.

    Args:
        target: A pipeline or a denoiser.
        adapter_names: Name or names of the adapters.

    Raises:
        ValueError: A name is unknown.
        TypeError: A name is not a string.
    """
    names = listed_names(adapter_names)
    denoisers = denoisers_of(target)
    with changing(denoisers.values()):
        for component, adapters in _having(target, names).items():
            detach(denoisers[component], [name for name in names if name in adapters.names])


def unload_softrepa(target: Any) -> None:
    """Removes all adapters and restores each denoiser to its state before the first adapter was added.

    Args:
        target: A pipeline or a denoiser.
    """
    denoisers = denoisers_of(target)
    with changing(denoisers.values()):
        for denoiser in denoisers.values():
            detach(denoiser)


def get_softrepa_adapters(target: Any) -> dict[str, Any]:
    """Returns the names of the loaded adapters with their weights, in the form that `set_softrepa` takes.

    Args:
        target: A pipeline or a denoiser.

    Returns:
        Weight by adapter name: a number, a list with one number per layer, or a dict with one number per stage, as it
        was set; None for adapters that are not active or are disabled. If several denoisers of a pipeline have an
        adapter of that name, the weight is that of the first denoiser.
    """
    weights: dict[str, Any] = {}
    for denoiser in denoisers_of(target).values():
        adapters = adapters_of(denoiser)
        if adapters is not None:
            state = adapters.state
            active = state.taking_part
            found = {name: plain(active[name]) if name in active else None for name in state.adapters}
            weights = found | weights
    return weights


def softrepa_parameters(target: Any, adapter_name: str | None = None) -> dict[str, nn.Parameter]:
    """Returns the parameters of one adapter, for an optimizer.

    Args:
        target: A pipeline or a denoiser.
        adapter_name: Name of the adapter. Defaults to the only loaded or only active adapter; required if there are
            several.

    Returns:
        Parameter by name: `tokens` and, if the adapter has timestep bins, `timestep_tokens`. For a pipeline with
        several denoisers each name begins with the name of the component, as in `transformer_2.tokens`.

    Raises:
        ValueError: There is no such adapter, or `adapter_name` is required.
    """
    several = len(denoisers_of(target)) > 1
    name = adapter_name or _only_name(target)
    return {
        f"{component}.{key}" if several else key: parameter
        for component, adapters in _having(target, [name]).items()
        for key, parameter in adapters[name].tokens.named_parameters()
    }


def _check_config(config: Any) -> None:
    if config is not None and not isinstance(config, SoftREPAConfig):
        raise TypeError(
            f"config must be a SoftREPAConfig, but is {quoted(config)}; "
            "SoftREPAConfig.for_denoiser(denoiser) makes one"
        )


def _parts(
    target: Any, denoisers: Mapping[str, nn.Module], source: Any, options: HubOptions
) -> dict[str, tuple[Any, HubOptions]]:
    """Returns the source of the adapter of each component, without components for which the source has none."""
    if len(denoisers) == 1:
        return dict.fromkeys(denoisers, (source, options))
    if isinstance(source, Mapping):
        parts = {component: (source[component], options) for component in denoisers if component in source}
    elif Path(source).is_file():
        parts = {}
    else:
        folders = {name: "/".join(filter(None, [options.subfolder, name])) for name in denoisers}
        parts = {name: (source, replace(options, subfolder=folder)) for name, folder in folders.items()}
        parts = {name: part for name, part in parts.items() if not is_absent(part[0], part[1])}
    if not parts:
        raise ValueError(
            f"{type(target).__name__} has several denoisers, so an adapter needs a subfolder for each of "
            f"{sorted(denoisers)} (or some), but {'the state dict' if isinstance(source, Mapping) else source} has "
            "none; load an adapter of one denoiser into that denoiser instead of the pipeline"
        )
    return parts


def _put(denoiser: nn.Module, name: str, adapter: Adapter, *, hotswap: bool) -> None:
    if hotswap:
        _loaded(denoiser).swap(name, adapter.config, dict(adapter.tokens.state_dict()))
    else:
        attach(denoiser, name, adapter)


def _having(target: Any, names: Sequence[str] = ()) -> dict[str, Adapters]:
    """Returns the adapters of each denoiser that has at least one of `names`, or any adapter if `names` is empty.

    Raises:
        ValueError: No denoiser has adapters, or one of the names is unknown to all denoisers.
    """
    denoisers = denoisers_of(target)
    loaded = {component: adapters_of(denoiser) for component, denoiser in denoisers.items()}
    having = {component: adapters for component, adapters in loaded.items() if adapters is not None}
    if not having:
        return {component: _loaded(denoiser) for component, denoiser in denoisers.items()}  # raises
    known = _names(denoisers)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no soft-token adapter is named {unknown}; loaded are {known}")
    return {
        component: adapters
        for component, adapters in having.items()
        if not names or any(name in adapters.names for name in names)
    }


def _loaded(denoiser: nn.Module) -> Adapters:
    adapters = adapters_of(denoiser)
    if adapters is None:
        raise ValueError(
            f"{type(denoiser).__name__} has no soft-token adapter; load_softrepa or add_softrepa one first"
        )
    return adapters


def _names(denoisers: Mapping[str, nn.Module]) -> list[str]:
    """Returns the names of the adapters of all denoisers, each once."""
    loaded = [adapters_of(denoiser) for denoiser in denoisers.values()]
    return list(dict.fromkeys(name for adapters in loaded if adapters is not None for name in adapters.names))


def _only_name(target: Any) -> str:
    having = _having(target).values()
    names = list(dict.fromkeys(name for adapters in having for name in adapters.names))
    active = list(dict.fromkeys(name for adapters in having for name in adapters.weights))
    candidates = names if len(names) == 1 else active
    if len(candidates) != 1:
        raise ValueError(f"adapter_name must say which adapter is meant: loaded are {names}")
    return candidates[0]


def _free_name(taken: Sequence[str], name: str | None, *, taken_is_fine: bool = False) -> str:
    if name is None:
        if taken_is_fine and len(taken) == 1:
            return taken[0]
        free = (DEFAULT_NAME if index == 0 else f"{DEFAULT_NAME}_{index}" for index in range(len(taken) + 1))
        return next(candidate for candidate in free if candidate not in taken)
    if not isinstance(name, str) or not name:
        raise TypeError(f"adapter_name must be a non-empty string, but is {name!r}")
    if taken_is_fine and name not in taken:
        raise ValueError(f"hotswap needs the name of a loaded adapter, but {name!r} is not among {taken or 'none'}")
    if not taken_is_fine and name in taken:
        raise ValueError(
            f"adapter names must be unique, but {name!r} is already loaded; choose another adapter_name, delete the "
            "old one, or pass hotswap=True to replace its values in place"
        )
    return name


def _base_name(target: Any) -> str | None:
    """Returns the Hub id that the target was loaded from, else its absolute path, else None.

    A path is not published: model cards and pushed configurations leave it out.
    """
    name = str(target.config.get("_name_or_path") or "")  # a Path if it was loaded from one
    return hub_id(name) or (os.path.abspath(name) if name else None)


def _warn_of_other_base(target: Any, config: SoftREPAConfig) -> None:
    """Warns if the adapter was trained on another Hub model. A local path may be a copy of any, so it is ignored."""
    names = (hub_id(config.base_model_name_or_path), hub_id(_base_name(target)))
    if all(names) and names[0] != names[1]:
        logger.warning("the adapter was trained on %s and is loaded into %s; alignment may not improve", *names)
