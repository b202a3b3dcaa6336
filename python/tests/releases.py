"""What the installed transformers lacks: `make test-compat` runs these tests with older releases too."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, QuantizedCache


def _lacks(backend: str) -> bool:
    try:
        QuantizedCache(backend=backend, config=LlamaConfig(num_hidden_layers=1))
    except ValueError as error:
        if "Unknown" not in str(error):
            raise
        return True
    return False


LACKS_FP8 = _lacks("fp8")

needs_fp8 = pytest.mark.skipif(LACKS_FP8, reason="this transformers has no QuantizedCache in fp8")
