"""Devices that torch has here."""

from __future__ import annotations

import torch

from .errors import DeviceError


def available_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        DeviceError: this machine lacks it; the message names ``device="cpu"``.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f'device="{device}" is no device that torch knows; pass device="cpu"') from error
    available = {
        "cuda": torch.cuda.is_available,
        "mps": lambda: torch.backends.mps.is_available(),
    }
    if not available.get(wanted.type, lambda: True)():
        raise DeviceError(f'device="{device}" is not available on this machine; pass device="cpu"')
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f'device="{device}" is not available on this machine ({error}); pass device="cpu"'
        ) from error
    return wanted
