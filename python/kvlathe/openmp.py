"""The OpenMP runtime that torch runs on, so that attention can use the same team of threads.

Its threads spin for a while after each of torch's operations; threads of our own would share the cores with them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from ._native import adopt_openmp


def parallel_address() -> int:
    """Where `GOMP_parallel` of torch's OpenMP runtime lies; 0 if torch has none that is reached that way."""
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        return 0
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Only a handle to what is loaded already; a lookup in it also searches the libraries that it depends on.
        loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def share_torch_threads() -> None:
    """Let attention run on torch's threads, where that is possible; else it has threads of its own."""
    adopt_openmp(parallel_address())
