"""Hugging Face causal language models with longspan's attention injected through the transformers registry."""
