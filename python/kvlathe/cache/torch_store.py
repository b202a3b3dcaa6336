"""A layer's tokens as torch tensors, on any device and with any compressor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..compressors import check_fits
from ..errors import NonFiniteError
from ..torch_codec import MAX_MAGNITUDE, can_be_coded
from .layer_store import Policy
from .nested_tensors import bytes_of
from .torch_side import TorchSide


class TorchStore:
    """A `LayerStore` of torch tensors: any device, any compressor."""

    can_attend = False

    def __init__(
        self, k_compressor: nn.Module, v_compressor: nn.Module, policy: Policy, keys: Tensor, values: Tensor
    ) -> None:
        check_fits(k_compressor, keys, "keys")
        check_fits(v_compressor, values, "values")
        self._policy = policy
        self._sides = [
            # New tensors, not views: an empty view would keep the prompt's whole tensor alive.
            TorchSide(compressor, policy.n_sinks, torch.empty_like(tensor[:, :, :0]))
            for compressor, tensor in ((k_compressor, keys), (v_compressor, values))
        ]
        self._granularity = max(side.granularity for side in self._sides)

    @property
    def n_tokens(self) -> int:
        return self._sides[0].n_tokens

    @property
    def n_coded(self) -> int:
        return max(side.n_coded for side in self._sides)

    @property
    def batch(self) -> int:
        return self._sides[0].tail.shape[0]

    def append(self, keys: Tensor, values: Tensor) -> None:
        for side, tensor, name in zip(self._sides, (keys, values), ("keys", "values"), strict=True):
            if side.is_coded and not can_be_coded(tensor):
                raise NonFiniteError(f"{name} hold NaN, infinity or a magnitude above {MAX_MAGNITUDE:g}")
        with self._both_or_none() as sides:
            for side, tensor in zip(sides, (keys, values), strict=True):
                side.append(tensor.detach())

    @contextmanager
    def _both_or_none(self) -> Iterator[list[TorchSide]]:
        """Copies of both sides to be changed, which take their places if nothing goes wrong."""
        sides = [side.copy() for side in self._sides]
        yield sides
        self._sides = sides

    def compress(self) -> None:
        if self.n_tokens <= self._policy.compress_start_len:
            return
        with self._both_or_none() as sides:
            for side in sides:
                spare = side.tail.shape[2] - self._policy.n_tail
                if side.is_coded and spare >= self._granularity:
                    side.code(spare // self._granularity * self._granularity)

    def read(self, room: int = 0) -> tuple[Tensor, Tensor]:
        keys, values = (side.read(room) for side in self._sides)
        return keys, values

    def crop(self, n_tokens: int) -> None:
        with self._both_or_none() as sides:
            for side in sides:
                side.crop(n_tokens)

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self._sides[0].tail.device)
        with self._both_or_none() as sides:
            for side in sides:
                side.select(index)

    def memory_use(self) -> tuple[int, int]:
        exact = sum(bytes_of(t) for side in self._sides for t in (side.sinks, side.tail))
        coded = sum(bytes_of(run.data) for side in self._sides for run in side.runs)
        return exact, coded

    def copy(self) -> TorchStore:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        # Tensors are replaced, never written to, so copies may share them.
        twin._sides = [side.copy() for side in self._sides]
        return twin

    def mark(self) -> list[TorchSide]:
        return self._sides

    def return_to(self, mark: list[TorchSide]) -> None:
        self._sides = mark
