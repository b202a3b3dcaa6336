"""What coding a layer really costs, measured end to end.

Importances come from gradients: they take errors for small and for independent from token to token. Errors in keys
partly cancel in the softmax, those in values partly add up, and by how much differs from layer to layer. So the keys of
each layer, and then its values, are coded alone, the KL divergence from the exact model is measured, and importances
are multiplied by the square root of measured over expected cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import CompressedDynamicCache
from ..errors import CalibrationError
from ..given_model import evaluation_mode
from ..preset import Preset
from ..progress import progress
from .quality import Evaluator, coders
from .quality.two_sided_kernel import Coder
from .replay import Replay

# Coarse enough for a layer's cost to stand out from rounding, fine enough to be near the rates in use.
_PROBED_BITS = 2.25
# A layer that seems to cost less than a tenth of what is expected, or more than ten times, is not believed.
_LARGEST_RATIO = 10.0
# One window is believed halfway, in logarithms: other text has other costs. The whole ratio wins little more on text of
# the window's kind, and loses on other text.
_TRUST = 0.5


def cost_factors(
    model: PreTrainedModel, preset: Preset, windows: Sequence[Tensor], *, tail: int
) -> list[tuple[float, float]]:
    """√(measured / expected) cost of each layer's keys and of its values, at 2.25 bits a value.

    Two passes a layer and window, each on average through half of the layers.

    Args:
        model: in float32; narrower types round by more than a layer's cost.
        preset: a calibration of this model.
        windows: LongTensors [T], of the kind of text that was calibrated on.
        tail: latest tokens that a query reads exactly.

    Returns:
        One pair a layer, each from 1/√10 to √10; (1, 1) for layers that are not coded.

    Raises:
        CalibrationError: a cost that is not finite.
    """
    probed = preset.with_bits(max(_PROBED_BITS, preset.side_bits_per_value + 1))
    code_keys, code_values = coders(CompressedDynamicCache.from_preset(probed))
    expected = probed.native.expected_costs()
    logarithms = torch.zeros(len(expected), 2, dtype=torch.float64)
    coded = preset.coded_layers
    steps = [(window, layer) for window in windows for layer in coded]
    with evaluation_mode(model):
        for window, layer in progress(steps, "measuring layers", "layer"):
            if layer == coded[0]:
                evaluator = Evaluator(model, [window], tail=tail, n_sinks=preset.n_sinks)
                replay = Replay(model, window)
            with replay.before(layer):
                costs = (
                    evaluator.run(_only(code_keys, layer), None).kld,
                    evaluator.run(None, _only(code_values, layer)).kld,
                )
            ratios = [_ratio(cost, of) for cost, of in zip(costs, expected[layer], strict=True)]
            logarithms[layer] += torch.tensor(ratios, dtype=torch.float64).log()
    if not logarithms.isfinite().all():
        raise CalibrationError("coding some layers alone makes the model's predictions NaN or infinite")
    factors = (logarithms * (_TRUST / len(windows))).exp()
    return [(float(key), float(value)) for key, value in factors]


def _only(code: Coder, chosen: int) -> Coder:
    return lambda layer, x: code(layer, x) if layer == chosen else x


def _ratio(measured: float, expected: float) -> float:
    """Measured over expected, within `_LARGEST_RATIO`; NaN stays NaN."""
    if expected <= 0:
        return 1.0
    if math.isnan(measured):
        return measured
    return min(max(measured / expected, 1 / _LARGEST_RATIO), _LARGEST_RATIO)
