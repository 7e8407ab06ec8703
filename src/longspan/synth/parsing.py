"""Replies of a model to objects: strict JSON first, then with the usual faults mended, else a reason.

Mended are: text and code fences around the JSON, a list inside an object, single quotes and Python's literals,
quotes and line breaks inside strings, comments, commas too many, and a tail that is cut off (whole objects stay).
Nothing a model may write makes this raise.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_FENCE = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_MAX_STARTS = 12
"""Brackets tried as the beginning of the JSON: text before it may hold some."""
_MAX_DEPTH = 40
_LITERALS = {
    "true": True,
    "false": False,
    "null": None,
    "True": True,
    "False": False,
    "None": None,
    "NaN": None,
}
_WORD = re.compile(r"[A-Za-z_]+")
_NUMBER = re.compile(r"[-+]?[0-9]{1,15}(\.[0-9]{1,15})?([eE][-+]?[0-9]{1,2})?")
_SPACE = re.compile(r"(?:\s+|//[^\n]*|/\*.{0,200}?\*/|#[^\n]*)+", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_HEX = {"x": 2, "u": 4, "U": 8}
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d"}


class Parsed(NamedTuple):
    """What a reply holds."""

    objects: list[dict[str, Any]]
    repairs: tuple[str, ...] = ()
    """Names of the faults that were mended."""
    error: str | None = None
    """Why there are none."""


def parse_reply(text: str) -> Parsed:
    """Return the objects of a reply: those of a list, or of the only list inside an object, or the object itself."""
    body = _THOUGHTS.sub("", text).strip()
    if not body:
        return Parsed([], error="empty reply")
    fences = [match.group(1).strip() for match in _FENCE.finditer(body)]
    bodies = [fence for fence in fences if fence[:1] in "[{"] + [body]
    for candidate in bodies:
        repairs = () if candidate == body else ("fence",)
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        objects = _objects(value)
        if objects:
            wrapped = isinstance(value, dict) and objects != [value]
            return Parsed(objects, (*repairs, "list inside an object") if wrapped else repairs)
    for candidate in bodies:
        repairs = () if candidate == body else ("fence",)
        found = _mend(candidate, repairs)
        if found is not None:
            return found
    has_bracket = "[" in body or "{" in body
    return Parsed([], error="no list of objects" if has_bracket else "no JSON")


def _mend(body: str, repairs: tuple[str, ...]) -> Parsed | None:
    starts = [match.start() for match in re.finditer(r"[\[{]", body)][:_MAX_STARTS]
    for start in starts:
        reader = _Reader(body, start)
        try:
            value = reader.value(0)
        except (_BrokenError, _CutError):
            continue
        objects = _objects(value)
        if objects == [value]:
            objects += _following(reader)
        if objects:
            text_around = start > 0 or bool(body[reader.at :].strip())
            wrapped = isinstance(value, dict) and objects[0] != value
            names = [*repairs, *(["text around"] if text_around else []), *sorted(reader.repairs)]
            return Parsed(objects, tuple(names + (["list inside an object"] if wrapped else [])))
    return None


def _following(reader: _Reader) -> list[dict[str, Any]]:
    """Return the objects that stand one after another behind the first, without a list around them."""
    found: list[dict[str, Any]] = []
    while True:
        reader.skip_to_member()
        if reader.text[reader.at : reader.at + 1] != "{":
            return found
        try:
            found += _objects(reader.value(0))
        except (_BrokenError, _CutError):
            return found
        reader.repairs.add("no list around")


def _objects(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list) and _all_objects(each)]
        return lists[0] if len(lists) == 1 else [value] if value else []
    return value if isinstance(value, list) and _all_objects(value) else []


def _all_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(each, dict) and each for each in values)


class _BrokenError(Exception):
    """This is not JSON, nor anything near it."""


class _CutError(Exception):
    """The text ends inside a value."""


class _Reader:
    """Reads one value that is nearly JSON; recursive, no deeper than 40 levels."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at
        self.repairs: set[str] = set()

    def value(self, depth: int) -> Any:
        """Read a value; of a list that is cut off, what is whole."""
        if depth > _MAX_DEPTH:
            raise _BrokenError
        self._skip()
        character = self._peek()
        if character == "[":
            return self._list(depth)
        if character == "{":
            return self._object(depth)
        if character in _QUOTES:
            return self._string()
        return self._bare()

    def skip_to_member(self) -> None:
        """Step over white space, comments and commas."""
        self._skip()
        while self.text[self.at : self.at + 1] == ",":
            self.at += 1
            self._skip()

    def _peek(self) -> str:
        if self.at >= len(self.text):
            raise _CutError
        return self.text[self.at]

    def _skip(self) -> None:
        if match := _SPACE.match(self.text, self.at):
            self.at = match.end()

    def _list(self, depth: int) -> list[Any]:
        self.at += 1
        values: list[Any] = []
        try:
            while self._next_member("]"):
                values.append(self.value(depth + 1))
        except _CutError:
            if depth > 1:  # inside an object that is not whole itself
                raise
            self.repairs.add("cut off")
        return values

    def _object(self, depth: int) -> dict[str, Any]:
        self.at += 1
        values: dict[str, Any] = {}
        try:
            while self._next_member("}"):
                name = self._string() if self._peek() in _QUOTES else self._name()
                self._skip()
                if self._peek() != ":":
                    raise _BrokenError
                self.at += 1
                values[name] = self.value(depth + 1)
        except _CutError:
            # {"questions": [{...}, {...   keeps its list; an object of a list that is cut off is left out.
            if depth or not any(isinstance(each, list) and each for each in values.values()):
                raise
            self.repairs.add("cut off")
        return values

    def _next_member(self, closing: str) -> bool:
        """Step over commas; return whether another member follows, and over the closing bracket if none does."""
        commas = 0
        while True:
            self._skip()
            character = self._peek()
            if character == ",":
                commas += 1
                self.at += 1
                continue
            if character == closing:
                if commas:
                    self.repairs.add("comma too many")
                self.at += 1
                return False
            if commas > 1:
                self.repairs.add("comma too many")
            return True

    def _name(self) -> str:
        match = _WORD.match(self.text, self.at)
        if match is None:
            raise _BrokenError
        self.at = match.end()
        self.repairs.add("name without quotes")
        return match.group()

    def _bare(self) -> Any:
        if match := _WORD.match(self.text, self.at):
            if match.end() == len(self.text):
                raise _CutError
            if match.group() not in _LITERALS:
                raise _BrokenError
            if match.group()[0] in "TFN":
                self.repairs.add("Python's literals")
            self.at = match.end()
            return _LITERALS[match.group()]
        match = _NUMBER.match(self.text, self.at)
        if match is None:
            raise _BrokenError
        if match.end() == len(self.text):
            raise _CutError
        self.at = match.end()
        return float(match.group()) if match.group(1) or match.group(2) else int(match.group())

    def _string(self) -> str:
        opening = self.text[self.at]
        closing = _QUOTES[opening]
        if opening != '"':
            self.repairs.add("quotes")
        self.at += 1
        parts: list[str] = []
        while True:
            character = self._peek()
            self.at += 1
            if character == "\\":
                parts.append(self._escape())
            elif character == closing and self._ends_string():
                return "".join(parts)
            else:
                if character == closing:
                    self.repairs.add("quotes inside a string")
                elif character == "\n":
                    self.repairs.add("line break inside a string")
                parts.append(character)

    def _escape(self) -> str:
        character = self._peek()
        self.at += 1
        if character in _HEX:
            digits = self.text[self.at : self.at + _HEX[character]]
            if re.fullmatch(rf"[0-9a-fA-F]{{{_HEX[character]}}}", digits) is None:
                if self.at + _HEX[character] > len(self.text):
                    raise _CutError
                return character
            self.at += len(digits)
            return self._character(int(digits, 16))
        return _ESCAPES.get(character, character)

    def _character(self, code: int) -> str:
        """Return a character by its number; JSON writes those beyond U+FFFF as two halves."""
        low = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})").match(self.text, self.at)
        if 0xD800 <= code < 0xDC00 and low:
            self.at = low.end()
            return chr(0x10000 + ((code - 0xD800) << 10) + (int(low.group(1), 16) - 0xDC00))
        return chr(code) if code <= 0x10FFFF else ""

    def _ends_string(self) -> bool:
        """Say whether the quote just read ends its string: what follows a string follows it.

        "He said "no", and left"     the quote before the comma does not: no member begins behind it
        """
        place = self.at
        if match := _SPACE.match(self.text, place):
            place = match.end()
        after = self.text[place : place + 1]
        if after in ("", "]", "}", ":"):
            return True
        if after != ",":
            return False
        rest = place + 1
        if match := _SPACE.match(self.text, rest):
            rest = match.end()
        following = self.text[rest : rest + 1]
        if following == "" or following in "]},[{-0123456789" or following in _QUOTES:
            return True
        word = _WORD.match(self.text, rest)
        if word is None:
            return False
        next_character = self.text[word.end() : word.end() + 1]
        return word.group() in _LITERALS or next_character == ":"
