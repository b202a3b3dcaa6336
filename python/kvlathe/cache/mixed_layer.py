"""A layer that keeps a state of linear attention or of a convolution beside its keys and values, as in Falcon-H1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from ..saved import by_maker
from ..stores import Policy, Store
from .layer import CompressedLayer


class CompressedMixedLayer(CompressedLayer, LinearAttentionLayer):  # type: ignore[misc]
    """Keys and values compressed, the state as transformers' own layer keeps it.

    Args:
        n_states: states of the layer.
        Others: as of `CompressedLayer`.
    """

    def __init__(
        self,
        k_compressor: nn.Module,
        v_compressor: nn.Module,
        policy: Policy,
        device: torch.device | None = None,
        *,
        n_states: int = 1,
    ) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=n_states)
        CompressedLayer.__init__(self, k_compressor, v_compressor, policy, device)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        of_the_state: Any = LinearAttentionLayer.is_croppable
        return bool(of_the_state.fget(self))

    def lazy_initialization(self, *states: Tensor, **named: Any) -> None:  # type: ignore[override]
        # As transformers' own layers of this kind tell the two apart.
        if states:
            CompressedLayer.lazy_initialization(self, *states)
        else:
            LinearAttentionLayer.lazy_initialization(self, **named)

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)
        CompressedLayer.crop(self, tokens_to_remove)

    def _select(self, store: Store, rows: list[int]) -> None:
        CompressedLayer._select(self, store, rows)
        LinearAttentionLayer.reorder_cache(self, torch.tensor(rows))  # type: ignore[arg-type]

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        CompressedLayer.reset(self)

    def __reduce__(self) -> tuple[Any, ...]:
        _, (_, _, *of_the_layer) = CompressedLayer.__reduce__(self)
        states = {name: getattr(self, name) for name in vars(LinearAttentionLayer(self.number_of_states))}
        return by_maker("mixed layer", of_the_layer, states)
