"""Raw text to a token store, on any number of processes or machines, with the same bytes whatever they are.

The input is cut into units by a rule that looks at the files alone. Whoever makes the piece of a unit reads,
encodes and writes it without talking to the others; the pieces become the store without being copied.
"""

from longspan.data.tokenize.corpus import CorpusJob, tokenize_corpus
from longspan.data.tokenize.encode import document_key, token_weights
from longspan.data.tokenize.tokenize_config import TokenizeConfig

__all__ = ["CorpusJob", "TokenizeConfig", "document_key", "token_weights", "tokenize_corpus"]
