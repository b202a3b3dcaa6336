"""Tensors within whatever a user's compressor returns: nested tuples, lists, dicts, dataclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def map_tensors(data: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to every tensor of a nested tuple, list, dict or dataclass."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, dict):
        return {key: map_tensors(value, function) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(map_tensors(value, function) for value in data))
    if isinstance(data, (tuple, list)):
        return type(data)(map_tensors(value, function) for value in data)
    if is_dataclass(data) and not isinstance(data, type):
        twin = copy.copy(data)
        for field in fields(data):
            object.__setattr__(twin, field.name, map_tensors(getattr(data, field.name), function))
        return twin
    return data


def bytes_of(data: Any) -> int:
    total = 0

    def add(tensor: Tensor) -> None:
        nonlocal total
        total += tensor.numel() * tensor.element_size()

    map_tensors(data, add)
    return total
