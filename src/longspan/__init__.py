"""longspan: take a language model from a short context window to a long one."""

__version__ = "0.1.0"
