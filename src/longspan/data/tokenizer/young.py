"""Characters younger than the Unicode version of one of the engines, which the two treat differently.

The Hugging Face library has expressions of Unicode 16 and a normalizer (NFC) of Unicode 9; gigatoken is at 17 in
both. So a letter that came in between is a word to one and a sign to the other, and a combining mark is put in
order, or joined with its letter, by one alone. Texts that hold such a character are for the Hugging Face library.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Assigned in Unicode 17.
_SINCE_16 = (
    "88f c5c cdc 1acf-1add 1ae0-1aeb 20c1 2b96 a7ce-a7cf a7d2 a7d4 a7f1 fbc3-fbd2 fd90-fd91 fdc8-fdce 10940-10959 "
    "10ec5-10ec7 10ed0-10ed8 10efa-10efb 11b60-11b67 11db0-11ddb 11de0-11de9 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 "
    "187f8-187ff 18d09-18d1e 18d80-18df2 1ccfa-1ccfc 1ceba-1ced0 1cee0-1cef0 1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff "
    "1f6d8 1f777-1f77a 1f8d0-1f8d8 1fa54-1fa57 1fa8a 1fa8e 1fac8 1facd 1faea 1faef 1fbfa 2b73a-2b73f 2cea2-2cead "
    "323b0-33479"
)
# Of Unicode 10 to 18: with a combining class, or the first of two characters that are joined.
_COMBINING_SINCE_9 = (
    "7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa a82c 105d2 105da 10d24-10d27 10d69-10d6d "
    "10eab-10eac 10ecb-10ecf 10ef0-10efb 10efd-10eff 10f46-10f50 10f82-10f85 11070 1133b 11382 11384 1138b 11390 "
    "113c2 113ce-113d0 1145e 11839-1183a 11935 1193d-1193e 11943 119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 "
    "11f41-11f42 1611e 16121-16122 16129 1612f 16d63 16d67 16d69 16ff0-16ff1 1d127-1d128 1d250-1d252 1d25b-1d25c "
    "1d25f 1d280-1d281 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5"
)
_FIRST_LEAD = 0xDF
"""The first byte of the first of them, U+07FD, in UTF-8."""


class Watch:
    """Finds young characters in UTF-8: next to nothing for ASCII, some ns a character for other text."""

    def __init__(self, *, normalizes: bool) -> None:
        text = f"{_SINCE_16} {_COMBINING_SINCE_9}" if normalizes else _SINCE_16
        pairs = sorted((int(first, 16), int(last or first, 16)) for first, _, last in _ends(text))
        self._first, self._last = np.array(pairs, np.int64).T
        # Ranges may overlap: each reaches as far as any before it.
        self._last = np.maximum.accumulate(self._last)
        self._begin = np.zeros((256, 256), bool)
        for first, last in pairs:
            for code in range(first, last + 1):
                lead, second = chr(code).encode()[:2]
                self._begin[lead, second] = True

    def __call__(self, text: bytes) -> bool:
        """Return whether a text in UTF-8 holds one."""
        if text.isascii():
            return False
        data = np.frombuffer(text, np.uint8)
        places = np.flatnonzero(data >= _FIRST_LEAD)
        places = places[self._begin[data[places], data[places + 1]]]
        if not len(places):
            return False
        lead = data[places].astype(np.int64)
        after = [data.take(places + step, mode="clip").astype(np.int64) & 63 for step in (1, 2, 3)]
        two = (lead & 31) << 6 | after[0]
        three = (lead & 15) << 12 | after[0] << 6 | after[1]
        four = (lead & 7) << 18 | after[0] << 12 | after[1] << 6 | after[2]
        code = np.where(lead < 0xE0, two, np.where(lead < 0xF0, three, four))
        row = np.searchsorted(self._first, code, side="right") - 1
        return bool(((row >= 0) & (code <= self._last[row])).any())


def _ends(ranges: str) -> Iterator[tuple[str, str, str]]:
    return (each.partition("-") for each in ranges.split())
