"""Text to token ids, on one of two engines that give the same ids.

gigatoken is the fast engine (35 million tokens/s on one core where the Hugging Face library makes 0.4
million). It is taken for tokenizers all of whose steps are known to mean the same to both, is compared with the
Hugging Face library on a sample of awkward text, and steps aside on any difference; what was found out is
remembered for the same files and versions. Special tokens written out in a text, `<|eos|>` say, are ordinary
text to both. SentencePiece models and ranks of tiktoken become the content of a tokenizer.json first.
"""

from longspan.data.tokenizer.engine import Backend, Offsets, Tokenizer
from longspan.data.tokenizer.loading import load_tokenizer
from longspan.data.tokenizer.training import train_bpe

__all__ = ["Backend", "Offsets", "Tokenizer", "load_tokenizer", "train_bpe"]
