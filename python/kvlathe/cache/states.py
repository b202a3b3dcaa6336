"""Whether new keys and values fit a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import DeviceError, DtypeError, ShapeError


@dataclass(frozen=True)
class Form:
    """What stays the same of a layer's keys and values from step to step.

    Attributes:
        dims: heads and components a head, of keys and of values.
        dtypes: of keys and of values, as the model hands them over; under autocast they differ.
        dtype: in which both are held: the wider one.
    """

    dims: tuple[tuple[int, int], tuple[int, int]]
    dtypes: tuple[torch.dtype, torch.dtype]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Form:
        """The form of keys and values [B, H, n, D]."""
        dims = (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])
        dtypes = keys.dtype, values.dtype
        return cls(dims, dtypes, torch.promote_types(*dtypes), keys.device)

    @property
    def values_per_token(self) -> int:
        """Numbers in the keys and values of one token."""
        return sum(heads * components for heads, components in self.dims)

    def fits(self, keys: Tensor, values: Tensor, batch: int) -> bool:
        """Whether all is as it was before: what every step but the first finds."""
        key_shape, value_shape = keys.shape, values.shape
        if len(key_shape) != 4 or len(value_shape) != 4:
            return False
        (n_heads, key_dim), (_, value_dim) = self.dims
        return (
            key_shape[0] == batch
            and key_shape[1] == n_heads
            and key_shape[3] == key_dim
            and (
                value_shape == key_shape
                if value_dim == key_dim
                else value_shape == (*key_shape[:3], value_dim)
            )
            and (keys.dtype, values.dtype) == self.dtypes
            and keys.device == self.device
            and values.device == self.device
        )

    def taking(self, keys: Tensor, values: Tensor, batch: int) -> Form:
        """The form once these keys and values have joined: number formats may become the wider ones of what is held.

        Raises:
            ShapeError, DeviceError: another form.
            DtypeError: numbers that the cache's format cannot hold.
        """
        if self.fits(keys, values, batch):
            return self
        check_alike(keys, values)
        if keys.device != self.device:
            raise DeviceError(
                f"the cache is on {self.device}, new keys are on {keys.device}; call reset() first"
            )
        sides = zip(("keys", "values"), (keys, values), self.dims, self.dtypes, strict=True)
        for name, states, held, dtype in sides:
            # What the model will read must be of its own format, unless autocast makes it so.
            fitting = torch.promote_types(dtype, states.dtype) == states.dtype or _autocast(states)
            if not fitting or torch.promote_types(states.dtype, self.dtype) != self.dtype:
                raise DtypeError(
                    f"the cache holds {dtype}, new {name} are {states.dtype}; call reset() first"
                )
            if (states.shape[1], states.shape[3]) != held:
                raise ShapeError(
                    f"{name} have {states.shape[1]} heads of {states.shape[3]} components, but this cache holds "
                    f"{held[0]} of {held[1]}; use one cache for one model"
                )
        if keys.shape[0] != batch:
            raise ShapeError(
                f"batch size is {keys.shape[0]}, but this cache holds {batch}; use one cache for one batch, reset() it "
                f"for the next, or batch_repeat_interleave() it for beams"
            )
        key_dtype, value_dtype = (
            torch.promote_types(held, states.dtype)
            for held, states in zip(self.dtypes, (keys, values), strict=True)
        )
        return replace(self, dtypes=(key_dtype, value_dtype))

    def held(self, states: Tensor) -> Tensor:
        """Keys or values in the format in which they are held."""
        # As they are in memory, too: some views only say that numbers are to be negated, or that all are zero.
        if states.is_neg() or states._is_zerotensor():
            states = states.clone()
        return states if states.dtype == self.dtype else states.to(self.dtype)

    def shown(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Held keys and values in the formats in which the model handed them over."""
        return keys.to(self.dtypes[0]), values.to(self.dtypes[1])


def _autocast(states: Tensor) -> bool:
    """Whether operations choose their own number formats."""
    return torch.is_autocast_enabled(states.device.type)


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
        if not states.is_floating_point():
            raise DtypeError(
                f"{name} are {states.dtype}, expected a floating-point type such as torch.float32"
            )
    if keys.device != values.device:
        raise DeviceError(f"keys are on {keys.device}, values on {values.device}; both must be on one device")
    if keys.dtype != values.dtype and not _autocast(keys):
        raise DtypeError(
            f"keys are {keys.dtype}, values {values.dtype}; both must have one dtype, unless torch.autocast is on"
        )
    if keys.shape[:3] != values.shape[:3]:
        raise ShapeError(
            f"keys of shape {list(keys.shape)} with values of shape {list(values.shape)}; all but the last dimension "
            f"must be equal"
        )
