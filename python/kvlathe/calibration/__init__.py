"""From text to a preset: text → moments → basis (`basis`), the fewest bits within a budget (`tuning`), and whether a
preset keeps its promise (`verification`).

`fisher` takes gradients, `rope_probe` finds rotations, `sensitivity` measures what coding each layer costs. `text` is
what calibration reads, `quality` what it is judged by; both serve `kvlathe.lab` as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._moved import moved_name

if TYPE_CHECKING:
    from .basis import CalibrationOptions, calibrate

__all__ = ["CalibrationOptions", "calibrate"]


def __getattr__(name: str) -> Any:
    # Text can be read without torch, which the basis needs.
    return moved_name(__name__, name)
