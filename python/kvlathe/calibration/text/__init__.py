"""Text to calibrate and to judge on: documents, split in two, and windows of tokens."""
