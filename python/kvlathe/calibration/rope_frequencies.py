"""Guesses of rotary frequencies, for `rope_probe` to test: from a model's buffers, tables or keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

Pairing = Literal["half_split", "interleaved"]


def distinct(candidates: Sequence[Tensor], head_dim: int) -> list[Tensor]:
    """Usable frequency sets, each once, as float64 on the CPU."""
    kept: list[Tensor] = []
    for candidate in candidates:
        frequencies = candidate.detach().to("cpu", torch.float64).flatten()
        if not 1 <= frequencies.numel() <= head_dim // 2 or not torch.isfinite(frequencies).all():
            continue
        if not any(torch.equal(frequencies, other) for other in kept):
            kept.append(frequencies)
    return kept


def buffer_frequencies(model: PreTrainedModel) -> list[Tensor]:
    """All tensors of the model called ...inv_freq, buffers or not (Gemma 3 has one per layer type)."""
    found = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    for module in model.modules():
        found += [v for n, v in vars(module).items() if n.endswith("inv_freq") and isinstance(v, Tensor)]
    return found


def unwrapped_rate(z: Tensor, positions: Tensor, n_first: int) -> Tensor:
    """Radians per position of rotating complex numbers.

    Args:
        z: complex [N, P], P numbers that turn at constant rates below pi.
        positions: [N]; the first ``n_first`` are consecutive, later ones may lie far off.

    Returns:
        [P] float64.
    """
    step = torch.angle((z[1:n_first] * z[: n_first - 1].conj()).sum(dim=0))
    # Refine with ever wider gaps: each estimate tells the whole turns of the next.
    gap = 1
    rows = [i for i in (2, 4, 8, 16, 32, n_first - 1) if i < n_first] + [z.shape[0] - 1]
    for row in rows:
        wide = int(positions[row] - positions[0])
        if wide <= gap:
            continue
        measured = torch.angle(z[row] * z[0].conj())
        turns = torch.round((step * wide - measured) / (2 * math.pi))
        step, gap = (measured + 2 * math.pi * turns) / wide, wide
    return step


def _table_frequencies(table: Any, positions: Tensor, n_first: int) -> list[Tensor]:
    """Frequencies from the (cos, sin) pair that a layer is handed; [] if it is no such pair."""
    if isinstance(table, Tensor) and table.is_complex():
        z = table
    elif isinstance(table, (tuple, list)) and len(table) == 2 and all(isinstance(t, Tensor) for t in table):
        if table[0].shape != table[1].shape:
            return []
        z = torch.complex(table[0].double().cpu(), table[1].double().cpu())
    else:
        return []
    z = z.to("cpu", torch.complex128).reshape(-1, z.shape[-1])
    if z.shape[0] % positions.numel() or z.shape[1] < 1:
        return []
    z = z[: positions.numel()]  # batch rows repeat
    width = z.shape[1]
    found = [z]
    if width % 2 == 0:
        found += [z[:, : width // 2], z[:, 0::2]]
    return [unwrapped_rate(part, positions, n_first) for part in found]


def handed_frequencies(handed: Sequence[Any], positions: Tensor, n_first: int) -> list[Tensor]:
    """Frequencies from the tables of all runs joined, or of the first run where they cannot be joined."""
    pairs = [t for t in handed if isinstance(t, (tuple, list)) and len(t) == 2]
    if len(pairs) == len(handed) > 1 and all(
        isinstance(x, Tensor) and x.dim() == 3 for t in pairs for x in t
    ):
        joined = tuple(torch.cat([t[i][:1] for t in pairs], dim=1) for i in range(2))
        return _table_frequencies(joined, positions, n_first)
    return _table_frequencies(handed[0], positions[:n_first], n_first) if handed else []


def key_frequencies(keys: Tensor, positions: Tensor, n_first: int, pairing: Pairing) -> list[Tensor]:
    """Frequencies measured on the keys themselves [H, N, D], one guess per plausible rotary size."""
    dim = keys.shape[-1]
    spread = (keys - keys.mean(dim=1, keepdim=True)).square().mean(dim=(0, 1)).sqrt()
    moving = torch.nonzero(spread > 1e-4 * keys.square().mean().sqrt()).flatten()
    if moving.numel() == 0:
        return []
    reach = int(moving[-1]) + 1
    sizes = {reach + reach % 2, dim, 3 * dim // 4, dim // 2, dim // 4}
    guesses = []
    for size in sorted(s for s in sizes if reach <= s <= dim and s % 2 == 0):
        part = keys[..., :size]
        a, b = part.chunk(2, dim=-1) if pairing == "half_split" else (part[..., 0::2], part[..., 1::2])
        # The head with the longest vector says most about a pair's angle.
        z = torch.complex(a, b)
        best = z.abs().mean(dim=1).argmax(dim=0)
        guesses.append(unwrapped_rate(z[best, :, torch.arange(size // 2)].T, positions, n_first))
    return guesses
