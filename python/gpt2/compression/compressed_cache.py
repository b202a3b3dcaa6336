"""The seed API under its own import path; see `kvlathe` for the real home of these names."""

from kvlathe import (
    CompressedDynamicCache,
    IdentityCompressor,
    QuantizedCalibratedCompressor,
    load_preset_cache,
)

__all__ = [
    "CompressedDynamicCache",
    "IdentityCompressor",
    "QuantizedCalibratedCompressor",
    "load_preset_cache",
]
