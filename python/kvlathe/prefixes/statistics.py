"""What a store was asked, and what it had."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PrefixStatistics:
    """Counts of one `PrefixStore` object since it was made; rows of a batch count one by one.

    Attributes:
        n_lookups: sequences that were looked for.
        n_hits: those of which a chunk or more was found.
        n_tokens_asked: their tokens.
        n_tokens_found: those that need not be computed again.
        n_chunks_saved: objects written; what was there already is not counted.
        n_bytes_saved: their sizes.
        n_failures: times that the store failed, was slow, or held something damaged.
    """

    n_lookups: int = 0
    n_hits: int = 0
    n_tokens_asked: int = 0
    n_tokens_found: int = 0
    n_chunks_saved: int = 0
    n_bytes_saved: int = 0
    n_failures: int = 0
