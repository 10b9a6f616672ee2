"""The verbs: what one does with soft tokens on a pipeline, or on a denoiser alone.

Each verb is a function whose first argument is the target, and the same verb is a method of every diffusers pipeline
and model once `diffusers_softrepa` is imported. An adapter belongs to the denoiser, never to the pipeline, so
pipelines that share a denoiser share it.

A pipeline with several denoisers (Wan 2.2, Ideogram 4) has one adapter for each under one name: a verb on the pipeline
is the verb on each of them, and in a folder each adapter lies in a subfolder of its component's name.
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
from .hub import CARD_NAME, UNKNOWN_REPO, HubOptions, is_absent, push_folder
from .hub_ids import hub_id
from .weights import plain, weights_by_name

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
    """Loads an adapter and makes it the only active one. Nothing is changed unless all of it fits.

    Args:
        target: A pipeline or a denoiser.
        source: A Hub repository id or a pasted address of the Hub, a folder, a safetensors file, or a state dict. For
            several denoisers: a repository or folder with a subfolder for each component, or a dict of state dicts by
            component; those that are not there get none.
        adapter_name: Its name; `"softrepa"`, `"softrepa_1"`, ... unless given.
        config: Needed with a state dict; elsewhere it replaces the stored one.
        hotswap: Put the values into the loaded adapter `adapter_name` of equal shapes; compiled code stays valid.
        is_trainable: Whether its tokens require gradients.
        weight_name: File name instead of `adapter_model.safetensors`.
        subfolder: Folder inside the repository or folder.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        local_files_only: Only look in the cache.
        cache_dir: Hub cache folder.
        force_download: Fetch even what is cached.
        proxies: Not supported by huggingface_hub 2; set HTTPS_PROXY.
        use_safetensors: None or True; there is no other format.

    Returns:
        The adapter's name.

    Raises:
        ValueError: The adapter is damaged, does not fit the denoiser, or the name is taken.
        OSError: The source cannot be found or reached.
        TypeError: An argument has the wrong type or name.
    """
    if isinstance(adapter_name, SoftREPAConfig):
        raise TypeError(
            "adapter_name must be a string, but is a SoftREPAConfig; give the config by keyword: config=..."
        )
    if config is not None and not isinstance(config, SoftREPAConfig):
        raise TypeError(f"config must be a SoftREPAConfig, but is {config!r}")
    if use_safetensors is False:
        raise ValueError("adapters are safetensors files only; leave use_safetensors out")
    if proxies is not None:
        raise ValueError("huggingface_hub takes no proxies argument any more; set the HTTPS_PROXY variable instead")
    hosts = denoisers_of(target)
    name = _free_name(_names(hosts), adapter_name, taken_is_fine=hotswap)
    options = HubOptions(weight_name, subfolder, revision, token, bool(local_files_only), cache_dir, force_download)
    parts = _parts(target, hosts, source, options)
    loaded = {}
    for component, (part, part_options) in parts.items():
        own_config, tensors = load_checkpoint(part, config, part_options)
        loaded[component] = make_adapter(hosts[component], own_config, tensors=tensors, trainable=is_trainable)
        _warn_of_other_base(target, own_config)
    with changing(hosts.values(), numbers_of=name if hotswap else None):
        name = _free_name(_names(hosts), name if hotswap else adapter_name, taken_is_fine=hotswap)  # as of now
        if hotswap:
            for component, adapter in loaded.items():
                _loaded(hosts[component]).check_swap(name, adapter.config)
        for component, adapter in loaded.items():
            _put(hosts[component], name, adapter, hotswap=hotswap)
    return name


def add_softrepa(
    target: Any,
    config: SoftREPAConfig | None = None,
    adapter_name: str | None = None,
    *,
    text_embeddings: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> str:
    """Adds a fresh adapter to train and makes it the only active one.

    Args:
        target: A pipeline or a denoiser.
        config: What to add; `SoftREPAConfig.for_denoiser(denoiser)` unless given.
        adapter_name: Its name; `"softrepa"`, `"softrepa_1"`, ... unless given.
        text_embeddings: `(S, D)`, what the tokens start from when the config says `init="text"`.
        generator: Source of the initial noise.

    Returns:
        The adapter's name. Its parameters are `softrepa_parameters(target, name)`.

    Raises:
        ValueError: The config does not fit the denoiser, or the name is taken.
    """
    hosts = denoisers_of(target)
    _free_name(_names(hosts), adapter_name)
    fresh = {}
    for component, denoiser in hosts.items():
        own = config or SoftREPAConfig.for_denoiser(denoiser)
        if own.base_model_name_or_path is None:
            own = replace(own, base_model_name_or_path=_base_name(target))
        fresh[component] = make_adapter(
            denoiser, own, text_embeddings=text_embeddings, generator=generator, trainable=True
        )
    with changing(hosts.values()):
        name = _free_name(_names(hosts), adapter_name)  # as of now
        for component, adapter in fresh.items():
            attach(hosts[component], name, adapter)
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
    """Saves one adapter as a folder that `load_softrepa` reads, and shares it on the Hub if asked.

    Args:
        target: A pipeline or a denoiser.
        save_directory: The folder; it gets weights, config and a model card, which is kept where there is one.
        adapter_name: Which adapter; needed when several are loaded and not exactly one is active.
        weight_name: File name instead of `adapter_model.safetensors`.
        is_main_process: Other processes of a distributed run do nothing.
        push_to_hub: Upload the files afterwards.
        repo_id: Where; the folder's name in your namespace unless given.
        private: Whether a repository made now is private.
        token: Hub token.
        commit_message: Message of the commit.
        create_pr: Open a pull request instead of committing.
        revision: Branch to commit to.
        license: Licence for the model card in the Hub's spelling, such as `"apache-2.0"`; none is written unless
            given, and the one that a card has stays.

    Returns:
        The URL of the commit or pull request on the Hub, None when nothing was pushed.

    Raises:
        ValueError: There is no such adapter, or it cannot be told which one is meant.
        OSError: The files cannot be written, or the Hub refused.
    """
    hosts = denoisers_of(target)
    name = adapter_name or _only_name(target)
    chosen = {component: adapters[name] for component, adapters in _having(target, [name]).items()}
    if not is_main_process:
        return None
    files = []
    for component, adapter in chosen.items():
        tensors = dict(adapter.tokens.state_dict())
        if len(hosts) == 1:
            files = save_checkpoint(save_directory, adapter.config, tensors, weight_name=weight_name, license=license)
        else:
            made = save_checkpoint(Path(save_directory) / component, adapter.config, tensors, weight_name=weight_name)
            files += [f"{component}/{file}" for file in made if file != CARD_NAME]
    if len(hosts) > 1:
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
    """Makes exactly the named adapters active, each with its weight.

    At weight 0 the output is the base model's, bit for bit; at 1 the trained adapter's; in between each block's output
    moves in a straight line from one to the other. Several adapters at weight 1 all show their tokens. Of a
    pipeline's denoisers, one that has none of them has no active adapter then.

    A weight is a number of Python, numpy or torch, or one for each layer of tokens as a list or `{layer: number}`,
    or one for each stage of a UNet, `{"down": 0.5}`; what a mapping leaves out has 1.

    Args:
        target: A pipeline or a denoiser.
        adapter_names: One name, several, or a mapping from names to weights as `get_softrepa_adapters` returns it, in
            which None means not active.
        adapter_weights: One weight for all, or one each; 1 unless given. A list for one name is a weight for each
            layer.
        guidance_branch: `"both"`, as published: the tokens join every denoiser call. `"positive"`: under
            classifier-free guidance only the rows of the positive prompt get them, and the prediction under the
            negative prompt is the base model's. A call in which the rows cannot be told apart is a ValueError.

    Raises:
        ValueError: A name is unknown, the numbers of names and weights differ, a weight is not a finite number or
            does not fit the adapter's layers, or `guidance_branch` is another word. Nothing is changed then.
        TypeError: The names are no strings, or weights are given beside a mapping.
    """
    branch = checked_branch(guidance_branch)
    chosen = weights_by_name(adapter_names, adapter_weights)
    with changing(denoisers_of(target).values()):
        _having(target, [*chosen, *(adapter_names if isinstance(adapter_names, Mapping) else [])])  # all are known
        states = [
            (adapters, adapters.weighed({name: chosen[name] for name in chosen if name in adapters.names}, branch))
            for adapters in _having(target).values()
        ]
        for adapters, state in states:
            adapters.become(state)


def enable_softrepa(target: Any) -> None:
    """Switches the active adapters on again after `disable_softrepa`."""
    with changing(denoisers_of(target).values()):
        for adapters in _having(target).values():
            adapters.set_enabled(True)


def disable_softrepa(target: Any) -> None:
    """Switches all adapters off; pictures are the base model's, bit for bit, until `enable_softrepa`."""
    with changing(denoisers_of(target).values()):
        for adapters in _having(target).values():
            adapters.set_enabled(False)


@contextmanager
def softrepa_disabled(target: Any) -> Iterator[None]:
    """Switches all adapters of `target` off while it lasts, and leaves everything else as it was.

    Contexts may be nested and overlap in several threads: the adapters are off until the last one ends. A target
    without adapters is left alone. An adapter that is loaded meanwhile into a denoiser that had none is not off.

        with softrepa_disabled(pipe):
            base = pipe("a cat").images[0]

    Args:
        target: A pipeline or a denoiser.
    """
    hosts = list(denoisers_of(target).values())
    paused = []
    with changing(hosts):
        for denoiser in hosts:
            adapters = adapters_of(denoiser)
            if adapters is not None:
                adapters.pause(1)
                paused.append((denoiser, adapters))
    try:
        yield
    finally:
        with changing(hosts):
            for denoiser, adapters in paused:
                if adapters_of(denoiser) is adapters:  # or it was unloaded meanwhile
                    adapters.pause(-1)


@contextmanager
def softrepa_left_as_found(target: Any) -> Iterator[None]:
    """Lets the adapters of `target` be activated, weighted and switched; puts all that back as it was afterwards.

    What is loaded or removed meanwhile stays so.

    Args:
        target: A pipeline or a denoiser.
    """
    hosts = list(denoisers_of(target).values())
    found = [(denoiser, adapters.state) for denoiser in hosts if (adapters := adapters_of(denoiser)) is not None]
    try:
        yield
    finally:
        with changing(hosts):
            for denoiser, state in found:
                adapters = adapters_of(denoiser)
                if adapters is not None:
                    here = {name: weight for name, weight in state.weights.items() if name in adapters.names}
                    branch = state.guidance_branch
                    adapters.become(
                        replace(adapters.state, weights=here, guidance_branch=branch, enabled=state.enabled)
                    )


def delete_softrepa(target: Any, adapter_names: str | Sequence[str]) -> None:
    """Removes the named adapters; no other one becomes active in their place.

    Raises:
        ValueError: A name is unknown.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    hosts = denoisers_of(target)
    with changing(hosts.values()):
        for component, adapters in _having(target, names).items():
            detach(hosts[component], [name for name in names if name in adapters.names])


def unload_softrepa(target: Any) -> None:
    """Removes all adapters and leaves the denoiser exactly as it was before the first one."""
    hosts = denoisers_of(target)
    with changing(hosts.values()):
        for denoiser in hosts.values():
            detach(denoiser)


def get_softrepa_adapters(target: Any) -> dict[str, Any]:
    """Returns the loaded adapters: weight by name, None for those that are not active now; `set_softrepa` takes it.

    A weight is a number, a list with one for each layer, or a dict with one for each stage, as it was set. Of a name
    that several denoisers of a pipeline have, it is that on the first.
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
    """Returns the parameters of one adapter by name, for an optimizer: `tokens` and, with bins, `timestep_tokens`.

    For a pipeline with several denoisers a component's name and a dot come before each.
    """
    several = len(denoisers_of(target)) > 1
    name = adapter_name or _only_name(target)
    return {
        f"{component}.{key}" if several else key: parameter
        for component, adapters in _having(target, [name]).items()
        for key, parameter in adapters[name].tokens.named_parameters()
    }


def _parts(
    target: Any, hosts: Mapping[str, nn.Module], source: Any, options: HubOptions
) -> dict[str, tuple[Any, HubOptions]]:
    """Returns where the adapter of each component lies; of several components, those that have one there."""
    if len(hosts) == 1:
        return dict.fromkeys(hosts, (source, options))
    if isinstance(source, Mapping):
        parts = {component: (source[component], options) for component in hosts if component in source}
    elif Path(source).is_file():
        parts = {}
    else:
        folders = {name: "/".join(filter(None, [options.subfolder, name])) for name in hosts}
        parts = {name: (source, replace(options, subfolder=folder)) for name, folder in folders.items()}
        parts = {name: part for name, part in parts.items() if not is_absent(part[0], part[1])}
    if not parts:
        raise ValueError(
            f"{type(target).__name__} has several denoisers, so an adapter needs a subfolder for each of "
            f"{sorted(hosts)} (or some), but {'the state dict' if isinstance(source, Mapping) else source} has none; "
            "load an adapter of one denoiser into that denoiser instead of the pipeline"
        )
    return parts


def _put(denoiser: nn.Module, name: str, adapter: Adapter, *, hotswap: bool) -> None:
    if hotswap:
        _loaded(denoiser).swap(name, adapter.config, dict(adapter.tokens.state_dict()))
    else:
        attach(denoiser, name, adapter)


def _having(target: Any, names: Sequence[str] = ()) -> dict[str, Adapters]:
    """Returns the adapters of each denoiser that has all or, of a pipeline with several, some of `names`.

    Raises:
        ValueError: No denoiser has adapters, or none has one of the names.
    """
    hosts = denoisers_of(target)
    loaded = {component: adapters_of(denoiser) for component, denoiser in hosts.items()}
    having = {component: adapters for component, adapters in loaded.items() if adapters is not None}
    if not having:
        return {component: _loaded(denoiser) for component, denoiser in hosts.items()}  # raises
    known = _names(hosts)
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


def _names(hosts: Mapping[str, nn.Module]) -> list[str]:
    """Returns the names of the adapters of all denoisers."""
    loaded = [adapters_of(denoiser) for denoiser in hosts.values()]
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
    """Returns the Hub id that the target was loaded from, else its path, which stays on this machine."""
    name = str(target.config.get("_name_or_path") or "")  # a Path if it was loaded from one
    return hub_id(name) or (os.path.abspath(name) if name else None)


def _warn_of_other_base(target: Any, config: SoftREPAConfig) -> None:
    """Warns when both names are Hub ids and differ; paths may be copies of anything."""
    names = (hub_id(config.base_model_name_or_path), hub_id(_base_name(target)))
    if all(names) and names[0] != names[1]:
        logger.warning("the adapter was trained on %s and is loaded into %s; alignment may not improve", *names)
