"""Ctrl-C anywhere in `generate`: after `reset` the cache is as good as new, and nothing goes on wrongly without it."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from cache_helpers import compressed_cache, identity_cache, low_rank, model_of, tokens
from kvlathe import CacheStateError, CompressedDynamicCache, RollbackError
from kvlathe._native import LowRankCodec
from tiny_models import tiny

_NEW_TOKENS = 10
_GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": _NEW_TOKENS}
_PROMPT = tokens(45)


def _user_cache() -> CompressedDynamicCache:
    """Values by the seed's compressor, keys by one that only the torch store can serve."""

    class Halves(torch.nn.Module):
        def compress(self, x: torch.Tensor) -> torch.Tensor:
            return x.half()

        def expand(self, coded: torch.Tensor) -> torch.Tensor:
            return coded.float()

    return CompressedDynamicCache([Halves()] * 2, [low_rank()] * 2, 2, uncompressed_tail=4)


_KINDS: dict[str, tuple[str, Callable[[], CompressedDynamicCache], str]] = {
    "exact": ("llama", lambda: identity_cache(model_of("llama")), "sdpa"),
    "compressed": ("llama", lambda: compressed_cache("llama"), "sdpa"),
    "expanded": ("llama", lambda: compressed_cache("llama"), "eager"),
    "window": ("gemma3", lambda: compressed_cache("gemma3"), "sdpa"),
    "expanded window": ("gemma3", lambda: compressed_cache("gemma3"), "eager"),
    "user": ("llama", _user_cache, "sdpa"),
}


class _Interrupted:
    """A model, a cache that is interrupted again and again, and what it should write."""

    def __init__(self, kind: str) -> None:
        name, self.make, attention = _KINDS[kind]
        self.model = tiny(name, attn_implementation=attention)
        self.cache = self.make()
        self.expected = self.generate(self.make())
        self.n_injected = self.n_stopped = self.n_told = self.n_mended = 0

    def generate(self, cache: CompressedDynamicCache, **kwargs: Any) -> torch.Tensor:
        return self.model.generate(_PROMPT, past_key_values=cache, **_GREEDY, **kwargs)

    def inject(self, call: Callable[[], object]) -> None:
        """Interrupt `call`, look at what it left, reset, and generate."""
        self.n_injected += 1
        try:
            call()
        except KeyboardInterrupt:
            self.n_stopped += 1
        # Ctrl-C in the last instructions of `no_grad` leaves it switched on: torch's matter, but later tests suffer.
        torch.set_grad_enabled(True)
        self.go_on()
        self.cache.reset()
        assert self.cache.get_seq_length() == 0
        # Once in a while the whole answer, else the first pass and one step.
        if self.n_injected % 10 == 0:
            assert torch.equal(self.generate(self.cache), self.expected)
        else:
            n = _PROMPT.shape[1] + 2
            short = self.model.generate(
                _PROMPT, past_key_values=self.cache, **{**_GREEDY, "max_new_tokens": 2}
            )
            assert torch.equal(short, self.expected[:, :n])
        self.cache.reset()

    def go_on(self) -> None:
        """Without a reset: either all layers are alike, or the next pass says that they are not."""
        lengths = {layer.get_seq_length() for layer in self.cache.layers}
        try:
            with torch.no_grad():
                self.model(input_ids=_PROMPT[:, :1], past_key_values=self.cache)
            assert len(lengths) == 1
        except CacheStateError:
            self.n_told += 1
            try:
                self.cache.crop(0)
            except RollbackError as error:
                # Windows have let go of what would be in sight again.
                assert "reset()" in str(error)
                return
            left = {layer.get_seq_length() for layer in self.cache.layers} - {0}
            assert len(left) <= 1
            if len(lengths) == 2 and 0 not in lengths:
                # Layers had been unlike; what is left goes on.
                self.n_mended += 1
                with torch.no_grad():
                    self.model(input_ids=_PROMPT[:, :1], past_key_values=self.cache)


@pytest.mark.parametrize("kind", _KINDS)
def test_in_every_module_of_the_model(kind: str, record_property: Callable[[str, object], None]) -> None:
    """Before each module runs, in the prompt's pass and in a later one."""
    run = _Interrupted(kind)
    modules = [module for module in run.model.modules() if not list(module.children())]
    for module in modules:
        for passes in (0, 3):
            left = [passes]

            def interrupt(*_: object, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] < 0:
                    left[0] = sys.maxsize
                    raise KeyboardInterrupt

            hook = module.register_forward_pre_hook(interrupt)
            try:
                run.inject(lambda: run.generate(run.cache))
            finally:
                hook.remove()
    assert run.n_stopped >= 2 * len(modules) - 6 and run.n_told > 5
    record_property("interrupts", run.n_stopped)


@pytest.mark.parametrize("kind", _KINDS)
def test_in_every_line_of_ours(kind: str, record_property: Callable[[str, object], None]) -> None:
    """Python looks for Ctrl-C between instructions: here before each line of this package, one after another."""
    run = _Interrupted(kind)
    package = sys.modules["kvlathe"].__path__[0]

    def counted(stop_at: int) -> int:
        n_lines = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal n_lines
            if not frame.f_code.co_filename.startswith(package):
                return None
            if event == "line":
                n_lines += 1
                if n_lines == stop_at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            run.generate(run.cache)
        finally:
            sys.settrace(None)
        return n_lines

    n_lines = counted(0)
    run.cache.reset()
    generator = random.Random(0)
    for stop_at in sorted(generator.sample(range(1, n_lines + 1), 30)):
        run.inject(lambda stop_at=stop_at: counted(stop_at))  # type: ignore[misc]
    assert run.n_stopped == 30
    record_property("interrupts", run.n_stopped)


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("kind", _KINDS)
def test_by_a_signal_at_any_time(kind: str, record_property: Callable[[str, object], None]) -> None:
    """What Ctrl-C does: a signal, by the processor's clock, also in the middle of native code."""
    run = _Interrupted(kind)
    generator = random.Random(1)

    def raise_interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def generate(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            run.generate(run.cache)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    before = signal.signal(signal.SIGVTALRM, raise_interrupt)
    try:
        whole = min(_seconds(lambda: run.generate(run.make())) for _ in range(3))
        # Some come too late: the clock ticks slowly, and the machine may be quicker than it was.
        while run.n_stopped < 30 and run.n_injected < 300:
            run.inject(lambda: generate(generator.uniform(1e-4, whole)))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert run.n_stopped == 30
    record_property("interrupts", run.n_stopped)


@pytest.mark.parametrize("kind", _KINDS)
def test_by_a_stopping_criterion(kind: str, record_property: Callable[[str, object], None]) -> None:
    """Between two steps: nothing is cut short, so the conversation may also go on."""
    run = _Interrupted(kind)

    class Interrupt(StoppingCriteria):
        def __init__(self, at: int) -> None:
            self.at = at

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
            if input_ids.shape[1] == _PROMPT.shape[1] + self.at:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    for at in range(1, _NEW_TOKENS):
        criteria = StoppingCriteriaList([Interrupt(at)])
        run.inject(lambda criteria=criteria: run.generate(run.cache, stopping_criteria=criteria))  # type: ignore[misc]
        with pytest.raises(KeyboardInterrupt):
            run.generate(run.cache, stopping_criteria=criteria)
        so_far = run.expected[:, : run.cache.get_seq_length() + 1]
        rest = {**_GREEDY, "max_new_tokens": run.expected.shape[1] - so_far.shape[1]}
        out = run.model.generate(so_far, past_key_values=run.cache, **rest)
        assert torch.equal(out, run.expected)
        run.cache.reset()
    assert run.n_stopped == _NEW_TOKENS - 1 and not run.n_told
    record_property("interrupts", run.n_stopped)


def test_in_the_native_modules_look_at_a_tensor() -> None:
    """Printing a dtype is where Python notices Ctrl-C: it must not be taken for a dtype without a name."""

    class Dtype:
        def __str__(self) -> str:
            raise KeyboardInterrupt

    class Interrupting:
        is_cpu, shape, dtype = True, (3, 8), Dtype()

        def stride(self) -> tuple[int, int]:
            return 8, 1

        def data_ptr(self) -> int:
            return 64  # somewhere: nobody comes so far as to look

    codec = LowRankCodec(torch.eye(8), torch.zeros(8), 8)
    tensor: Any = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        codec.decode(tensor, torch.empty(3, 8))
    with pytest.raises(KeyboardInterrupt):
        codec.encode(tensor, torch.empty(3, codec.vector_bytes, dtype=torch.uint8))
