"""Evaluation sets as others released them, read from files: `long-llm` (FlagEmbedding) and HELMET."""
