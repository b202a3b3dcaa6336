"""Windows of a length that tells something: the model reads them, and queries see coded tokens in them."""

from __future__ import annotations

from typing import Any

from ...errors import EvaluationError


def most_positions(config: Any) -> int | None:
    """How many tokens the model reads, where its config says so."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def check_model_reads(config: Any, window: int) -> None:
    """Refuse windows beyond the model's positions.

    Raises:
        EvaluationError: with how many tokens it reads.
    """
    limit = most_positions(config)
    if limit is not None and limit < window:
        raise EvaluationError(
            f"windows of {window} tokens: the model reads at most {limit}; use shorter windows"
        )


def check_reads_coded(window: int, *, n_sinks: int, tail: int, block_len: int) -> None:
    """Refuse windows in which hardly anything is coded, so that every preset would look perfect.

    Raises:
        EvaluationError: no query sees a whole coded block.
    """
    least = n_sinks + block_len + tail
    if window < least:
        raise EvaluationError(
            f"in windows of {window} tokens no query sees a coded block: {n_sinks} sinks, a block of {block_len} and a "
            f"tail of {tail} tokens take {least}; use windows of at least that many, {4 * least} or more to learn much"
        )
