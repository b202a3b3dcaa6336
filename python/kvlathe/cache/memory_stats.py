"""What the layers of a cache hold, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .layer import CompressedLayer
from .layer_kinds import tensor_bytes
from .mixed_layer import CompressedMixedLayer


def memory_stats(layers: Sequence[Any], seq_len: int) -> dict[str, int | float]:
    """What `CompressedDynamicCache.get_memory_stats` tells of a cache's layers that hold ``seq_len`` tokens."""
    exact = coded = imported = n_values = equivalent = stock = n_stock = 0
    for layer in layers:
        if not isinstance(layer, CompressedLayer):
            stock, n_stock = stock + tensor_bytes(layer), n_stock + 1
            continue
        if isinstance(layer, CompressedMixedLayer):
            stock += tensor_bytes(layer)
        layer_exact, layer_coded, layer_imported = layer.memory_use()
        layer_values, layer_equivalent = layer.values_held()
        exact, coded = exact + layer_exact, coded + layer_coded
        imported += layer_imported
        n_values, equivalent = n_values + layer_values, equivalent + layer_equivalent
    ours, total, equivalent = exact + coded, exact + coded + stock, equivalent + stock
    compressed = max(getattr(layer, "n_coded", 0) for layer in layers)
    return {
        "total_bytes": total,
        "total_mb": total / 2**20,
        "exact_bytes": exact + stock,
        "coded_bytes": coded,
        "imported_bytes": imported,
        "stock_bytes": stock,
        "num_layers": len(layers),
        "window_layers": sum(isinstance(layer, CompressedLayer) and layer.is_sliding for layer in layers),
        "stock_layers": n_stock,
        "seq_len": seq_len,
        "compressed_tokens": compressed,
        "uncompressed_tokens": seq_len - compressed,
        "uncompressed_bytes_equivalent": equivalent,
        "compression_ratio": equivalent / total if total else 1.0,
        "bits_per_value": 8.0 * ours / n_values if n_values else 0.0,
    }
