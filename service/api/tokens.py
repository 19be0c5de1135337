"""Single token ids → what log-probabilities say of them: texts, bytes, and places in an answer."""

import codecs
import re
from typing import Any

_BROKEN = "\ufffd"
"""What a decoder shows for bytes that are no whole character."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Tells texts and bytes of single tokens, each looked up once.

    Args:
        tokenizer: a fast transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(special)
        self._special_names = frozenset(str(token) for token in special.values())
        # Decoders treat a text's first token differently, so that each is decoded behind this one.
        self._before = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._before_text = self._decode(self._before)
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes that the token adds to a text; a special token has those of its name."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._find(token)
        return known

    def text_of(self, token: int) -> str:
        """Its text, or OpenAI's `bytes:` and hexadecimals where its bytes are no whole characters."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def text_of_prompt(self, ids: tuple[int, ...]) -> str:
        """The text of a prompt that was given as ids, special tokens included."""
        return self._decode(list(ids))

    def is_special(self, token: int) -> bool:
        """It stands for no text: answers leave it out."""
        return token in self._special

    def names_special(self, text: str) -> bool:
        """A special token is written that way."""
        return text in self._special_names

    def _find(self, token: int) -> bytes:
        both = self._decode([*self._before, token])
        text = both[len(self._before_text) :] if both.startswith(self._before_text) else self._decode([token])
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if _BROKEN not in text or not isinstance(piece, str):
            return text.encode()
        byte = _BYTE.fullmatch(piece)
        if byte is not None:
            return bytes.fromhex(byte[1])
        if all(character in _BYTE_LEVEL for character in piece):
            return bytes(_BYTE_LEVEL[character] for character in piece)
        return text.encode()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet, in which byte-level vocabularies are written: visible Latin-1 for itself, then on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()


class Places:
    """Where tokens begin in a text, in characters, as they come; a half character has its beginning's place.

    Args:
        start: of the first token.
    """

    def __init__(self, texts: TokenTexts, start: int = 0) -> None:
        self.next = start
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token: int, *, hidden: bool = False) -> int:
        """The place of the next token; one that is `hidden` takes no room."""
        place = self.next
        if not hidden:
            self.next += len(self._decoder.decode(self._texts.bytes_of(token)))
        return place
