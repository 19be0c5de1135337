"""Texts, bytes and places of single tokens, with real tokenizers of both families."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.api.tokens import Places, TokenTexts
from tests.fixtures.tiny import tiny_tokenizer

Encode = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenTexts, Encode]:
    """GPT-2's kind: a vocabulary over bytes in visible characters."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return TokenTexts(tokenizer), lambda text: list(tokenizer.encode(text))


@pytest.fixture(scope="module")
def sentence_pieces() -> tuple[TokenTexts, Encode]:
    """Llama 2's kind: spaces as ▁, one in front of every text, and single bytes as <0xNN>."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    for piece in ("▁", "a", "b", "▁a", "▁b", "é", "�"):
        vocabulary[piece] = len(vocabulary)
    backend = Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    return TokenTexts(tokenizer), lambda text: list(tokenizer.encode(text))


@given(st.text(max_size=30))
def test_the_bytes_of_tokens_join_to_the_text(byte_level: tuple[TokenTexts, Encode], text: str) -> None:
    texts, encode = byte_level
    assert b"".join(texts.bytes_of(token) for token in encode(text)) == text.encode()


@given(st.text(alphabet="ab é😀", max_size=20))
def test_so_do_those_of_sentence_pieces_behind_their_space(
    sentence_pieces: tuple[TokenTexts, Encode], text: str
) -> None:
    texts, encode = sentence_pieces
    joined = b"".join(texts.bytes_of(token) for token in encode(text))
    assert joined == (b" " + text.encode() if text else b"")


@given(st.text(max_size=30))
def test_every_token_begins_where_the_text_before_it_ends(
    byte_level: tuple[TokenTexts, Encode], text: str
) -> None:
    texts, encode = byte_level
    ids = encode(text)
    places = Places(texts)
    for index, token in enumerate(ids):
        before = b"".join(map(texts.bytes_of, ids[:index])).decode(errors="ignore")
        assert places.put(token) == len(before)
    assert places.next == len(text)


def test_a_piece_of_a_character_is_told_by_its_bytes(byte_level: tuple[TokenTexts, Encode]) -> None:
    texts, encode = byte_level
    assert [texts.text_of(token) for token in encode("é")] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_a_vocabulary_that_has_the_broken_mark_itself_keeps_it(
    sentence_pieces: tuple[TokenTexts, Encode],
) -> None:
    texts, encode = sentence_pieces
    assert texts.text_of(encode("a�")[-1]) == "�"


def test_special_tokens_have_their_names_and_take_no_room_in_answers(
    byte_level: tuple[TokenTexts, Encode],
) -> None:
    texts, encode = byte_level
    [token] = encode("<|im_end|>")
    assert texts.text_of(token) == "<|im_end|>"
    assert texts.is_special(token)
    places = Places(texts, 5)
    assert (places.put(token, hidden=True), places.next) == (5, 5)


def test_an_id_that_the_tokenizer_does_not_know_has_no_text(byte_level: tuple[TokenTexts, Encode]) -> None:
    texts, _ = byte_level
    assert texts.bytes_of(100_000) == b""
