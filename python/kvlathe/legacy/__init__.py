"""What of the seed is separate from the rest. Its API is in `gpt2.compression.compressed_cache`."""
