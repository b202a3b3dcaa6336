"""What can be evaluated: a way to store keys and values, with an exact statement of the bytes that it takes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...calibration.quality.coders import with_coded
from ...calibration.quality.two_sided_kernel import Coder
from ...preset import Side


class Method(Protocol):
    """A way to store keys and values.

    Attributes:
        name: for people, and unique in an evaluation: "kivi-4".
        family: methods of one family differ only in their rate and are joined by a line in plots: "KIVI".
        identity: all that the numbers depend on besides model and text; another identity is measured anew.
        group_len: tokens that are coded together; an incomplete group stays exact.
    """

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def group_len(self) -> int: ...

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        """What is read back of a run of tokens.

        Args:
            x: [batch, n_kv_heads, n_tokens, head_dim], float32, as the model hands them to its cache (keys rotated);
                they end where `coded_end` says.
            position: of the first token in its sequence.

        Returns:
            The same shape and dtype; ``x`` itself for a side that stays exact.
        """
        ...

    def coded_end(self, start: int, end: int) -> int:
        """Where the last whole group ends of those from position ``start`` on, before ``end``; if none, ``start``."""
        ...

    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        """Bytes of ``n_tokens`` coded tokens of one sequence, all KV heads: codes, scales, offsets, norms, padding.

        A side that stays exact counts 2 bytes a value.
        """
        ...

    def basis_bytes(self) -> int:
        """Bytes that all caches of a model share: bases, rotations, codebooks, calibrated ranges."""
        ...


def coders_of(method: Method, n_sinks: int) -> tuple[Coder, Coder]:
    """A method's coders of keys and of values, the arguments of `Evaluator.run`.

    Tokens are coded from the first one after the sinks on, in whole groups; an incomplete last group, which a
    cache would keep in its tail, stays exact.
    """

    def coder(side: Side) -> Coder:
        def code(layer: int, x: Tensor) -> Tensor:
            end = method.coded_end(n_sinks, x.shape[2])
            return with_coded(x, n_sinks, end, lambda run: method.code(layer, side, run, n_sinks))

        return code

    return coder("key"), coder("value")
