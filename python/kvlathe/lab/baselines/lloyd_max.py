"""Lloyd-Max: the scalar quantiser of least squared error for a distribution (Lloyd 1957/1982, Max 1960).

Levels are the means of their cells, and cells end half-way between levels; both rules in turn converge. On a sample
instead of a density this is k-means in one dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lloyd_max(points: Tensor, weights: Tensor, n_levels: int, *, n_rounds: int = 5000) -> Tensor:
    """Levels [n_levels], rising, float64.

    Args:
        points: [N], rising: a fine grid over a density, or a sorted sample.
        weights: [N], not negative: the density on the grid, or ones.
    """
    x, w = points.double(), weights.double()
    mass = torch.cat([w.new_zeros(1), w.cumsum(0)])
    moment = torch.cat([w.new_zeros(1), (w * x).cumsum(0)])
    # Start from the middles of cells of equal mass.
    middles = (torch.arange(n_levels, dtype=x.dtype) + 0.5) / n_levels * mass[-1]
    levels = x[torch.searchsorted(mass[1:], middles).clamp_max(len(x) - 1)]
    for _ in range(n_rounds):
        edges = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        at = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([len(x)])])
        cell_mass = mass[at[1:]] - mass[at[:-1]]
        means = (moment[at[1:]] - moment[at[:-1]]) / cell_mass.clamp_min(1e-300)
        moved = torch.where(cell_mass > 0, means, levels)
        if torch.allclose(moved, levels, rtol=0, atol=1e-12):
            break
        levels = moved
    return levels


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Every number's nearest level, in x's dtype."""
    levels = levels.to(x)
    edges = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(x.contiguous(), edges)]
