"""Configs of other trainers (axolotl, LLaMA-Factory, TRL, ms-swift, torchtune) as recipes.

`tools/*.yaml` say what each key of a tool means; `translating.translate` reads a file by its table, so that every key
is translated, said to be without effect here, or said not to be carried over.
"""

from longspan.train.translate.tables import KeyTable, load_tables
from longspan.train.translate.translating import Translation, translate

__all__ = ["KeyTable", "Translation", "load_tables", "translate"]
