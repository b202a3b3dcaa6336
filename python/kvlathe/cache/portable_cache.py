"""A cache that leaves its process: copied, pickled, written to a file."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor, nn

from ..model_identity import model_identity
from .container import write_cache
from .expansions import Expansions
from .layer import CompressedLayer
from .passes import Passes
from .recurrent_states import RecurrentStates

if TYPE_CHECKING:
    from typing_extensions import Self

# What a pickled cache does without.
_OF_THIS_PROCESS = ("_passes", "_expansions", "_is_asked", "_model")


class PortableCache(RecurrentStates):
    """What of `CompressedDynamicCache` goes into a copy or a file, and what stays with its process."""

    #: The identity of the weights that a loaded cache was computed with, "" if unknown.
    _weights: str = ""

    def _begin_process(self) -> None:
        """Whose turn it is, and what was told."""
        self._passes = Passes()
        self._expansions = Expansions()
        # Whether compiled code has asked for its mask since the last update.
        self._is_asked = False
        # The model that it was made for, as long as somebody holds it.
        self._model: ref[nn.Module] | None = None

    def save(
        self,
        path: str | os.PathLike[str],
        token_ids: Tensor | Sequence[Any] | None = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        """Write the cache to one file, which `load` reads in any process. The file appears whole or not at all.

        Args:
            token_ids: [B, n_tokens], of the tokens held; more behind them, as ``generate`` returns, are left out.
            model: whose identity is written, so that no other weights go on from here; by default `from_preset`'s.

        Raises:
            ContainerError: the file cannot be written; the old one is as it was.
            ShapeError: ids of other tokens than the cache holds.
            PresetError: a cache that is not made from one calibrated preset.
            ModelError: layers that are transformers' own, or weights that are not there.
            CacheStateError: an empty cache, layers that are unlike, or another thread at work on them.
        """
        model = model if model is not None else self.model
        weights = self._weights if model is None else model_identity(model)
        with self._passes.unchanged("save()"):
            write_cache(self.layers, path, token_ids, weights)

    def held_still(self, call: str) -> AbstractContextManager[None]:
        """For ``call``, which reads all layers as they are at one moment.

        Raises:
            CacheStateError: another thread is at work on them.
        """
        return self._passes.unchanged(call)

    @property
    def model(self) -> nn.Module | None:
        """The model that it was made for, while somebody holds it."""
        return None if self._model is None else self._model()

    def note_weights(self, weights: str) -> None:
        """Say with whose weights the tokens were computed, for a file; see `model_identity`."""
        self._weights = weights

    def __getstate__(self) -> dict[str, Any]:
        with self._passes.unchanged("pickling"):
            state = {name: held for name, held in self.__dict__.items() if name not in _OF_THIS_PROCESS}
            # Copies share the packed blocks, and nobody changes them while they are written.
            state["layers"] = [
                copy.copy(layer) if isinstance(layer, CompressedLayer) else layer for layer in self.layers
            ]
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_process()

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self._passes.unchanged("copy.deepcopy()"):
            twin = object.__new__(type(self))
            memo[id(self)] = twin
            for name, value in self.__dict__.items():
                twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin
