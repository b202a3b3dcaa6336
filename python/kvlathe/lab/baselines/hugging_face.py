"""Hugging Face's own `QuantizedCache`, run through its real code.

Each call makes a fresh layer of transformers, hands it the run of tokens in one `update`, as a prefill would, and reads
back what the layer holds. So whatever transformers does (one fp8 scale for a whole tensor, say) is what is measured.

* fp8: float8_e4m3fn, one float32 scale for each side of a layer, frozen at the first update.
* quanto, HQQ: 4 or 2 bits in groups of 64, along the axes that transformers' documentation recommends; a scale and a
  zero point for each group, 16 bits each in a 16-bit model. They need ``optimum-quanto`` and ``hqq``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache, __version__

from ...calibration.rope_probe import ModelShape
from ...errors import EvaluationError
from ...preset import Side
from .baseline import Baseline, packed_bytes

_GROUP = 64
_OPTIONS: dict[str, dict[str, int]] = {
    "fp8": {},
    "quanto": {"axis_key": 0, "axis_value": 0, "q_group_size": _GROUP},
    "hqq": {"axis_key": 1, "axis_value": 1, "q_group_size": _GROUP},
}


class HuggingFace(Baseline):
    """A backend of `QuantizedCache`.

    Args:
        backend: "fp8", "quanto" or "hqq".
        bits: of a code; 8 for fp8.

    Raises:
        EvaluationError: the backend's package is missing or does not work here, or transformers refuses the model.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape, backend: str, bits: int) -> None:
        super().__init__(shape)
        self.name = "hf-fp8" if backend == "fp8" else f"hf-{backend}-{bits}"
        self.family = f"Hugging Face {backend}"
        self._bits = bits
        self._backend = backend
        self._config = model.config
        options: dict[str, Any] = (
            _OPTIONS[backend] if backend == "fp8" else {**_OPTIONS[backend], "nbits": bits}
        )
        self._options = options
        # Groups of numbers must come out even.
        self.group_len = _GROUP // math.gcd(_GROUP, self.values_a_token) if backend != "fp8" else 1
        # A first run finds out whether the backend works: some compile code when they are first used.
        try:
            self.code(0, "key", torch.zeros(1, shape.n_kv_heads, _GROUP, shape.head_dim), 0)
        except (ImportError, ValueError, RuntimeError, OSError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EvaluationError(
                f"{self.name} does not run here, with transformers {__version__}: {reason}"
            ) from error

    @property
    def identity(self) -> str:
        return f"baseline {self.name} of transformers {__version__}"

    def code(self, layer: int, side: Side, x: Tensor, position: int) -> Tensor:
        holder: Any = QuantizedCache(backend=self._backend, config=self._config, **self._options).layers[0]
        holder.update(x, x)
        held = holder._quantized_keys if side == "key" else holder._quantized_values
        return holder._dequantize(held).to(x.dtype).view_as(x)

    def coded_bytes(self, layer: int, side: Side, n_tokens: int) -> int:
        n_values = n_tokens * self.values_a_token
        if self._backend == "fp8":
            return n_values + 4
        return packed_bytes(n_values, self._bits) + -(-n_values // _GROUP) * 4
