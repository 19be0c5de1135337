"""One call of a function as a model writes it, a JSON object, read character by character as it comes."""

import json
from collections.abc import Collection
from typing import Literal

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")

_Place = Literal[
    "begin", "first key", "key", "in key", "colon", "value", "in value", "comma", "done", "broken"
]


class CallScan:
    """Reads `{"name": "f", "arguments": {…}}`; the members may come in any order, `parameters` is arguments too.

    Args:
        names: of the functions that exist; another one is no call.

    Attributes:
        place: where in the object it is; "done" and "broken" are the end.
        name: of the function, once the call is sure to be one.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.place: _Place = "begin"
        self.name: str | None = None
        self._names = names
        self._key = ""
        self._raw = ""
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._called: str | None = None
        self._arguments: str | None = None
        self._told = 0

    @property
    def over(self) -> bool:
        """Nothing more is read."""
        return self.place in ("done", "broken")

    def put(self, character: str) -> bool:
        """Read one more; False if it was not taken, which is so once it is over."""
        if self.place != "in value":
            self._between(character)
        elif not self._in_value(character):
            return self.put(character)
        return self.place != "broken"

    def take(self) -> str:
        """What has come of the arguments since the last time; nothing before the name is known."""
        if self.name is None or self._arguments is None:
            return ""
        new = self._arguments[self._told :]
        self._told = len(self._arguments)
        return new

    def _between(self, character: str) -> None:
        if self.place == "in key":
            self._raw += character
            if self._closes_string(character):
                self._key, self.place = self._text(), "colon"
        elif character in _SPACE:
            return
        elif self.place == "begin":
            self.place = "first key" if character == "{" else "broken"
        elif self.place in ("first key", "key") and character == '"':
            self._raw, self.place = character, "in key"
        elif self.place in ("first key", "comma") and character == "}":
            self._end()
        elif self.place == "colon" and character == ":":
            self.place = "value"
        elif self.place == "comma" and character == ",":
            self.place = "key"
        elif self.place == "value" and character not in ",}]:":
            self._raw, self._depth, self._quoted, self.place = "", 0, False, "in value"
            self._in_value(character)
        else:
            self.place = "broken"

    def _in_value(self, character: str) -> bool:
        """One more of a member's value; False if it had ended before."""
        plain = not self._quoted and self._depth == 0
        if plain and self._raw and character in ",} \t\r\n":
            self._member()
            return False
        self._raw += character
        if self._quoted:
            self._quoted = not self._closes_string(character)
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if self._streams():
            self._arguments = self._raw
        if not self._quoted and self._depth <= 0 and character in '"}]':
            self._member()
        return True

    def _streams(self) -> bool:
        """The value is the arguments themselves, and may be told as it comes."""
        if self._key not in _ARGUMENTS or not self._raw.startswith("{"):
            return False
        self._decide()
        return True

    def _member(self) -> None:
        """A value has ended."""
        self.place = "comma"
        if self._key == "name":
            self._called = self._text()
            if self._called not in self._names:
                self.place = "broken"
            elif self._arguments is not None:
                self._decide()
        elif self._key in _ARGUMENTS and not self._raw.startswith("{"):
            # Some models write the arguments as a text that holds the object, or null for none.
            self._arguments = "{}" if self._raw == "null" else self._text()
            self._decide()

    def _end(self) -> None:
        self.place = "done" if self._called is not None else "broken"
        if self.place == "done":
            self._arguments = "{}" if self._arguments is None else self._arguments
            self._decide()

    def _decide(self) -> None:
        if self._called is not None and self.place != "broken":
            self.name = self._called

    def _closes_string(self, character: str) -> bool:
        """Of the string that is being read, its last quote has come."""
        if self._escaped:
            self._escaped = False
            return False
        self._escaped = character == "\\"
        return character == '"' and len(self._raw) > 1

    def _text(self) -> str:
        """The raw JSON string, read; a place that cannot be read breaks the call."""
        try:
            text = json.loads(self._raw, strict=False)
        except ValueError:
            text = None
        if not isinstance(text, str):
            self.place = "broken"
            return ""
        return text
