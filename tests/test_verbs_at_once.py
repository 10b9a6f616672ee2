"""A verb changes all or nothing, one at a time, and never a call that has begun."""

import functools
import itertools
import linecache
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import diffusers_softrepa
import tiny
import zoo
from diffusers_softrepa import SoftREPAConfig, softrepa_disabled, softrepa_parameters
from diffusers_softrepa.families import family_of, text_blocks

PACKAGE = str(Path(diffusers_softrepa.__file__).parent)
every_family = pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
SD3 = tiny.FAMILIES[2]


class Subject:
    """A denoiser with adapter `a`, and numbers for others of its shapes."""

    def __init__(self, family: tiny.Family = SD3) -> None:
        torch.manual_seed(0)
        self.family, self.denoiser, self.inputs = family, family.denoiser().requires_grad_(False), family.inputs(2)
        self.blocks = [block.module for block in text_blocks(self.denoiser, family_of(self.denoiser))]
        stages = family_of(self.denoiser).stages
        where = {"stages": ["down", "mid", "up"]} if stages else {"num_layers": len(self.blocks)}
        self.config = SoftREPAConfig.for_denoiser(self.denoiser, num_timestep_bins=10, **where)
        self.tensors = [{name: torch.randn(shape) for name, shape in self.config.shapes.items()} for _ in range(2)]
        self.contexts: list[Any] = []
        self.load(0, "a")

    def load(self, index: int, name: str | None = None, **kwargs: Any) -> str:
        return self.denoiser.load_softrepa(self.tensors[index], name, config=self.config, **kwargs)

    @torch.no_grad()
    def call(self) -> Tensor:
        return self.family.call(self.denoiser, self.inputs, 430.0)

    def traces(self) -> list[list[str]]:
        return [sorted(vars(module)) for module in self.denoiser.modules()]

    def enter(self, context: AbstractContextManager[None]) -> None:
        context.__enter__()
        self.contexts.append(context)  # or it would end

    def start_over(self) -> None:
        self.denoiser.unload_softrepa()
        self.load(0, "a")


VERBS: dict[str, Callable[[Subject], Any]] = {
    "unload": lambda s: s.denoiser.unload_softrepa(),
    "delete": lambda s: s.denoiser.delete_softrepa("a"),
    "disable": lambda s: s.denoiser.disable_softrepa(),
    "weight 0": lambda s: s.denoiser.set_softrepa("a", 0.0),
    "weight 0.5": lambda s: s.denoiser.set_softrepa("a", 0.5),
    "load another": lambda s: s.load(1, "b"),
    "hotswap": lambda s: s.load(1, "a", hotswap=True),
    "unload and load another": lambda s: (s.denoiser.unload_softrepa(), s.load(1, "a")),
    "disabled for a while": lambda s: s.enter(softrepa_disabled(s.denoiser)),
}


@every_family
@pytest.mark.parametrize("name", VERBS)
def test_a_verb_in_the_middle_of_a_call_is_for_the_calls_after_it(family: tiny.Family, name: str):
    subject = Subject(family)
    for at in range(len(subject.blocks)):
        subject.start_over()
        old = subject.call()
        verb = iter([VERBS[name]])

        def change(*_: Any, verb: Any = verb) -> None:
            for once in verb:
                thread = threading.Thread(target=once, args=(subject,))
                thread.start()
                thread.join()

        handle = subject.blocks[at].register_forward_pre_hook(change)
        assert torch.equal(subject.call(), old), at
        handle.remove()
        assert not torch.equal(subject.call(), old), at


@every_family
@pytest.mark.parametrize("before", ["nothing loaded", "disabled", "weight 0"])
def test_tokens_that_come_in_the_middle_of_a_call_are_for_the_calls_after_it(family: tiny.Family, before: str):
    subject = Subject(family)
    {
        "nothing loaded": lambda: subject.denoiser.unload_softrepa(),
        "disabled": lambda: subject.denoiser.disable_softrepa(),
        "weight 0": lambda: subject.denoiser.set_softrepa("a", 0.0),
    }[before]()
    base = subject.call()
    verb = iter([lambda: subject.load(1, "b"), lambda: subject.denoiser.enable_softrepa()])
    for block in subject.blocks:
        block.register_forward_pre_hook(lambda *_: next(verb, lambda: None)() and None)
    assert torch.equal(subject.call(), base)
    assert not torch.equal(subject.call(), base)


@every_family
def test_a_denoiser_unloaded_in_the_middle_of_a_call_has_no_trace_once_the_call_ends(family: tiny.Family):
    subject = Subject(family)
    subject.denoiser.unload_softrepa()
    bare, base = subject.traces(), subject.call()
    for fails in (False, True):
        subject.load(0, "a")

        def unload(*_: Any, fails: bool = fails) -> None:
            subject.denoiser.unload_softrepa()
            if fails:
                raise RuntimeError("out of memory")

        handle = subject.blocks[0].register_forward_pre_hook(unload)
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                subject.call()
        else:
            assert not torch.equal(subject.call(), base)
        handle.remove()
        assert subject.traces() == bare
        assert torch.equal(subject.call(), base)


WAN = next(specimen for specimen in zoo.everything() if specimen.name == "wan-image")


@pytest.mark.parametrize("change", ["unload", "load again", "weight"])
@pytest.mark.parametrize("kind", ["rows in the block's text", "rows at its projections"])
def test_blocks_that_run_again_have_the_tokens_of_their_forward_whatever_was_done_since(kind: str, change: str):
    found = []
    for changed in (False, True):
        specimen = WAN if kind == "rows at its projections" else zoo.SPECIMENS["sd3"]
        denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, zoo.LENGTH)
        denoiser.enable_gradient_checkpointing(specimen.checkpointing)
        parameters = list(softrepa_parameters(denoiser).values())
        output = specimen.call(denoiser, inputs)
        if changed and change != "weight":
            denoiser.unload_softrepa()
        if changed and change == "load again":
            denoiser.add_softrepa(zoo.everywhere(denoiser))
        if changed and change == "weight":
            denoiser.set_softrepa("softrepa", 0.3)
        found.append(torch.autograd.grad(output.square().mean(), parameters))
        attributes = {name for module in denoiser.modules() for name in vars(module) if "softrepa" in name}
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert bool(attributes) == (change != "unload")


def run_all(*jobs: Callable[[], Any]) -> list[BaseException]:
    """Runs jobs in threads of their own; returns what they raised."""
    raised: list[BaseException] = []

    def run(job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.fixture
def _impatient() -> Any:
    """Lets threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_impatient")
def test_verbs_in_several_threads_are_verbs_one_after_the_other():
    subject = Subject()
    denoiser = subject.denoiser
    denoiser.unload_softrepa()
    bare, base = subject.traces(), subject.call()

    def work(own: str) -> None:
        for turn in range(15):
            subject.load(turn % 2, own)
            free = subject.load(turn % 2)  # a name that nobody else gets
            denoiser.set_softrepa([own, free], [0.5, 1.0])
            assert {own, free} <= set(denoiser.get_softrepa_adapters())
            with softrepa_disabled(denoiser):
                assert not any(denoiser.get_softrepa_adapters().values())
            denoiser.enable_softrepa()
            subject.load(turn % 2, own, hotswap=True)
            denoiser.delete_softrepa([own, free])
            with pytest.raises(ValueError, match="no soft-token adapter"):
                denoiser.set_softrepa(own)

    assert run_all(*(functools.partial(work, name) for name in "abcd")) == []
    assert denoiser.get_softrepa_adapters() == {}
    assert subject.traces() == bare
    assert torch.equal(subject.call(), base)


@pytest.mark.usefixtures("_impatient")
def test_calls_beside_verbs_are_each_of_one_state():
    subject = Subject()
    denoiser = subject.denoiser
    states: list[Callable[[], Any]] = [
        lambda: denoiser.set_softrepa("a"),
        lambda: denoiser.set_softrepa("a", 0.0),
        lambda: denoiser.set_softrepa("a", 0.5),
        denoiser.disable_softrepa,
        denoiser.enable_softrepa,
        lambda: subject.load(1, "a", hotswap=True),
        lambda: denoiser.set_softrepa("a"),
        lambda: subject.load(0, "b"),
        lambda: denoiser.set_softrepa(["a", "b"], [1.0, 0.25]),
        denoiser.unload_softrepa,
        lambda: subject.load(0, "a"),
    ]
    known = [(verb(), subject.call())[1] for verb in states]
    done = threading.Event()
    seen: list[Tensor] = []

    def change() -> None:
        for turn, verb in enumerate(itertools.cycle(states)):
            verb()
            if turn >= 8 * len(states) and len(seen) >= 40:
                return done.set()

    def call() -> None:
        while not done.is_set():
            seen.append(subject.call())

    assert run_all(change, call, call) == []
    strange = [one for one in seen if not any(torch.equal(one, other) for other in known)]
    assert not strange, f"{len(strange)} of {len(seen)}"


class Interrupted(BaseException):
    """What Ctrl-C raises, at a line of our choice."""


def lines_of(verb: Callable[[], Any], interrupt_at: int | None = None) -> int:
    """Runs a verb, interrupted before line number `interrupt_at` of ours that it runs; returns how many it ran."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # Signals come only where something is called or repeated, not at the words that open and close a block.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not line.startswith(("with ", "try:")):
            count += 1
            if count - 1 == interrupt_at:
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        verb()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", [name for name in VERBS if "and" not in name])
def test_a_verb_that_is_interrupted_leaves_the_old_or_the_new(name: str):
    subject = Subject()
    verb = functools.partial(VERBS[name], subject)
    old, old_names = subject.call(), subject.denoiser.get_softrepa_adapters()
    verb()  # what is kept from the first time on is there now
    subject.start_over()
    total = lines_of(verb)
    new, new_names = subject.call(), subject.denoiser.get_softrepa_adapters()
    assert not torch.equal(old, new)
    outcomes = set()
    for line in sorted({*range(0, total, max(1, total // 60)), total - 1}):
        subject.start_over()
        with pytest.raises(Interrupted):
            lines_of(verb, line)
        found, names = subject.call(), subject.denoiser.get_softrepa_adapters()
        is_old = torch.equal(found, old) and names == old_names
        assert is_old or (torch.equal(found, new) and names == new_names), line
        outcomes.add(is_old)
        assert run_all(subject.denoiser.unload_softrepa) == []  # another thread can go on
    assert True in outcomes


def test_a_verb_on_two_denoisers_that_is_interrupted_leaves_both_old_or_both_new():
    first, second = Subject(), Subject()
    parts = {"transformer": first.denoiser, "transformer_2": second.denoiser}

    class Pipeline:
        components = parts
        config = MappingProxyType({})

    pair = Pipeline()
    verbs = {
        "set": lambda: diffusers_softrepa.set_softrepa(pair, "a", 0.5),
        "disable": lambda: diffusers_softrepa.disable_softrepa(pair),
        "unload": lambda: diffusers_softrepa.unload_softrepa(pair),
        "hotswap": lambda: diffusers_softrepa.load_softrepa(
            pair, dict.fromkeys(parts, first.tensors[1]), "a", config=first.config, hotswap=True
        ),
    }
    for verb in verbs.values():
        for subject in (first, second):
            subject.start_over()
        old = [first.call(), second.call()]
        verb()
        for subject in (first, second):
            subject.start_over()
        total = lines_of(verb)
        new = [first.call(), second.call()]
        for line in range(0, total, max(1, total // 40)):
            for subject in (first, second):
                subject.start_over()
            with pytest.raises(Interrupted):
                lines_of(verb, line)
            found = [first.call(), second.call()]
            assert all(map(torch.equal, found, old)) or all(map(torch.equal, found, new)), line


def test_contexts_that_overlap_switch_adapters_off_until_the_last_one_ends():
    subject = Subject()
    with_tokens = subject.call()
    first, second = softrepa_disabled(subject.denoiser), softrepa_disabled(subject.denoiser)
    first.__enter__()
    base = subject.call()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(subject.call(), base)
    second.__exit__(None, None, None)
    assert torch.equal(subject.call(), with_tokens)
    assert not torch.equal(base, with_tokens)


def test_a_context_leaves_what_was_disabled_disabled_and_does_not_outlive_an_exception():
    subject = Subject()
    with_tokens = subject.call()
    with pytest.raises(KeyError), softrepa_disabled(subject.denoiser):
        raise KeyError
    assert torch.equal(subject.call(), with_tokens)
    subject.denoiser.disable_softrepa()
    with softrepa_disabled(subject.denoiser):
        base = subject.call()
    assert torch.equal(subject.call(), base)
    with softrepa_disabled(subject.denoiser):
        subject.denoiser.enable_softrepa()
        assert torch.equal(subject.call(), base), "a context is stronger than enable_softrepa"
        subject.denoiser.unload_softrepa()
        subject.load(1, "a")
    assert subject.denoiser.get_softrepa_adapters() == {"a": 1.0}
