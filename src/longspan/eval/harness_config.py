"""Settings of published benchmarks, as lm-eval defines them or as their authors released them."""

from __future__ import annotations

from typing import Annotated

import pydantic

from longspan.core.config import Commas, Config, Length


class HarnessConfig(Config):
    """Which benchmarks, and what is changed about them."""

    tasks: Annotated[tuple[str, ...], Commas]
    """Of lm-eval: longbench, longbench2, infinitebench, babilong, mmlu, mmlu_continuation, or one of their tasks.
    Released files: long-llm:longbench, :infbench, :longeval, :mmlu, :needle; fu-2024:infbench; helmet:recall, :rag,
    :rerank, :cite, :icl, :longqa, :summ, :ruler. Several with commas."""
    data_root: str | None = None
    """Folder of the data. None: lm-eval fetches its own from the hub."""
    subtasks: Annotated[tuple[str, ...], Commas] = ()
    """Of released files, the sets or subjects, with commas; `all`. Default: as published."""
    num_fewshot: pydantic.NonNegativeInt | None = None
    """Examples before each question. None: as published."""
    limit: pydantic.PositiveInt | None = None
    """The first so many questions of each set."""
    input_length: Length | None = None
    """Tokens of a prompt at most, such as 31500 or 128k; the rest is cut out of it."""
    max_length: Length | None = None
    """Tokens of prompt and answer at most, such as 128k. None: no limit."""
    max_seq_lengths: str | None = None
    """BABILong's length, such as 0k, 4k or 128k."""
    include_path: str | None = None
    """Folder with further lm-eval task definitions."""
    exact: bool = False
    """long-llm:longbench and :needle to the letter: what ends an answer; places and score."""
