"""Whether new keys and values fit a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DeviceError, DtypeError, ShapeError


@dataclass(frozen=True)
class Form:
    """What stays the same of a layer's keys and values from step to step.

    Attributes:
        dims: heads and components a head, of keys and of values.
    """

    dims: tuple[tuple[int, int], tuple[int, int]]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Form:
        """The form of keys and values [B, H, n, D]."""
        return cls(
            ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])), keys.dtype, keys.device
        )

    @property
    def values_per_token(self) -> int:
        """Numbers in the keys and values of one token."""
        return sum(heads * components for heads, components in self.dims)

    def fits(self, keys: Tensor, values: Tensor, batch: int) -> bool:
        """Whether all is as it was before: what every step but the first finds."""
        key_shape, value_shape = keys.shape, values.shape
        return (
            len(key_shape) == len(value_shape) == 4
            and key_shape[:3] == value_shape[:3]
            and key_shape[0] == batch
            and ((key_shape[1], key_shape[3]), (value_shape[1], value_shape[3])) == self.dims
            and keys.dtype == values.dtype == self.dtype
            and keys.device == values.device == self.device
        )

    def check(self, keys: Tensor, values: Tensor, batch: int) -> None:
        """Refuse keys and values of another form.

        Raises:
            ShapeError, DtypeError, DeviceError
        """
        if self.fits(keys, values, batch):
            return
        check_alike(keys, values)
        if keys.device != self.device:
            raise DeviceError(
                f"the cache is on {self.device}, new keys are on {keys.device}; call reset() first"
            )
        if keys.dtype != self.dtype:
            raise DtypeError(f"the cache holds {self.dtype}, new keys are {keys.dtype}; call reset() first")
        for name, states, held in zip(("keys", "values"), (keys, values), self.dims, strict=True):
            if (states.shape[1], states.shape[3]) != held:
                raise ShapeError(
                    f"{name} have {states.shape[1]} heads of {states.shape[3]} components, but this cache holds "
                    f"{held[0]} of {held[1]}; use one cache for one model"
                )
        raise ShapeError(
            f"batch size is {keys.shape[0]}, but this cache holds {batch}; use one cache for one batch, reset() it for "
            f"the next, or batch_repeat_interleave() it for beams"
        )


def check_alike(keys: Tensor, values: Tensor) -> None:
    """Refuse keys and values that are no pair.

    Raises:
        ShapeError, DtypeError, DeviceError
    """
    for name, states in (("keys", keys), ("values", values)):
        if states.dim() != 4:
            raise ShapeError(
                f"{name} have the shape {list(states.shape)}, expected [batch, heads, tokens, head_dim]"
            )
    if keys.device != values.device:
        raise DeviceError(f"keys are on {keys.device}, values on {values.device}")
    if keys.dtype != values.dtype:
        raise DtypeError(f"keys are {keys.dtype}, values {values.dtype}")
    if not keys.is_floating_point():
        raise DtypeError(
            f"keys and values are {keys.dtype}, expected a floating-point type such as torch.float32"
        )
    if keys.shape[:3] != values.shape[:3]:
        raise ShapeError(f"keys of shape {list(keys.shape)} with values of shape {list(values.shape)}")
