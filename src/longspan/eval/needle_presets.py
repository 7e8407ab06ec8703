r"""Grids, prompts, needles and scores of published needle evaluations, as settings of ours.

What they share with the originals: lengths, depths, samples, texts, prompt, haystack order (as given; the
originals read Paul Graham's essays, which are given by path), mode, and the metric by name. What differs, for
all of them: the prompt has the stated length as a whole, the needle stands at the nearest sentence border of
any language, on a line of its own, and a depth is what it says.

A preset of fewer than 16 samples a length (fu-2024 and longllm: 10) cannot show an effective context, whatever the
answers: 10 of 10 say no more than 72 %. More are asked with --samples.

fu-2024     Fu et al. 2024, arXiv 2402.10171. 40 lengths 1000..128000, 10 depths 0..1, a sentence. What was
            plotted is the share of the words of the expected answer in the output; the original divided 11
            different words by 12 ("a" stands twice), so a perfect answer had 0.917; here it has 1. The
            original cut the text 200 tokens short of the length to leave room, looked for full stops by ids
            of two tokenizers, and put a second BOS before the needle. The exact form has its score, depths in whole
            percents, its cut and its place: behind the last full stop before the depth.
easycontext EasyContext's needle test at 1M tokens, as its README runs it: 20 lengths 50000..1000000, 11 depths
            0..1, 2 samples, a number of 7 digits, teacher-forced. The original's prompts were longer than stated by
            needle and question, its depths were rounded to tens (0.25 was shown as 0.2), its numbers could
            have fewer digits and its tokens were right for one tokenizer.
longllm     FlagEmbedding's Long_LLM: 10 lengths 8000..80000, 10 depths 0..1, a sentence, rouge-L F1 of the
            package `rouge`. The original counted the position of the needle from the start of the prompt and put
            it at that place of the context, in the middle of a sentence. Its prompt spells "infomation", and it
            compares with the needle and the empty lines around it, which count as a word: a perfect answer has
            0.974. All of it is so in the exact form (`preset_named("longllm", exact=True)`), whose depths are cut to
            whole percents and whose prompt alone has the stated length.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from longspan.core.errors import ArgumentError

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fu-2024": {
            "lengths": "1000:128000:40",
            "depths": "0:1:10",
            "samples": 1,
            "needle": "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
            "question": "What is the best thing to do in San Francisco?",
            "answer": "eat a sandwich and sit in Dolores Park on a sunny day.",
            "prompt": "<|im_start|> This is a very long story book: <book> {context} </book>.\n Based on the content "
            "of the book, Question: {question}\nAnswer:",
            "mode": "generate",
            "scorer": "word_recall",
            "max_new_tokens": 50,
            "order": "given",
            "repeat": True,
        },
        "easycontext": {
            "lengths": "50000:1000000:20",
            "depths": "0:1:11",
            "samples": 2,
            "needle": "The special magic Singapore number is: {number}.",
            "question": "What is the special magic Singapore number? Answer: The special magic Singapore number is:",
            "answer": "{number}",
            "distractors": ("The special magic {key} number is: {number}.",),
            "keys": ("New York", "London", "Paris", "Tokyo", "Beijing", "Berlin"),
            "answer_digits": 7,
            "prompt": "This is a very long story book: <book> {context} </book>.\n Based on the content of the book, "
            "Question: {question}",
            "mode": "teacher_forced",
            "order": "given",
            "repeat": True,
            "seed": 24242424,
        },
        "longllm": {
            "lengths": "8000:80000:10",
            "depths": "0:1:10",
            "samples": 1,
            "needle": "The best thing to do in San Francisco is sitting in Dolores Park and eating a hamburg on a "
            "sunny day.",
            "question": "What is the best thing to do in San Francisco?",
            "answer": "The best thing to do in San Francisco is sitting in Dolores Park and eating a hamburg on a "
            "sunny day.",
            "prompt": "There is an important information hidden in the following context. Find the information and "
            "memorize it. I will quiz you about the important information there.\n{context}\n\n{question}\nAnswer:",
            "mode": "generate",
            "scorer": "rouge_l_summary",
            "max_new_tokens": 50,
            "order": "given",
            "repeat": True,
        },
    }
)
"""Settings by name; see `NeedleConfig` for what they mean."""

EXACT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fu-2024": {
            "original": "fu-2024",
            "depths": (0, 0.11, 0.22, 0.33, 0.44, 0.56, 0.67, 0.78, 0.89, 1),
            "needle": f"\n{PRESETS['fu-2024']['needle']}\n",
            "scorer": "word_recall_repeated",
        },
        "longllm": {
            "original": "longllm",
            "depths": (0, 0.11, 0.22, 0.33, 0.44, 0.55, 0.66, 0.77, 0.88, 1),
            "needle": f"\n\n{PRESETS['longllm']['needle']}\n\n",
            "answer": f"\n\n{PRESETS['longllm']['answer']}\n\n",
            "prompt": PRESETS["longllm"]["prompt"].replace(
                "important information hidden", "important infomation hidden"
            ),
        },
    }
)
"""What an original has otherwise than it states, by the name of the preset: spelling, places, faults of scoring."""


def preset_named(name: str, *, exact: bool = False) -> dict[str, Any]:
    """Return the settings of a preset; `exact`: to the letter of the original, faults of its scoring included.

    Raises:
        ArgumentError: there is no such preset, or no exact form of it; the message lists those that exist.
    """
    if name not in PRESETS:
        raise ArgumentError("there is no such preset", found=repr(name), allowed=sorted(PRESETS))
    if exact and name not in EXACT:
        raise ArgumentError("this preset has no exact form", found=repr(name), allowed=sorted(EXACT))
    return {**PRESETS[name], **(EXACT[name] if exact else {})}
