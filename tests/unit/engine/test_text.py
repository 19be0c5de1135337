"""Text comes in whole characters, and stop strings never show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from service.engine.text import TextStream


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"], trainer)
    return tokenizer


def _pieces(backend, text, stops=(), prompt="", **push) -> tuple[list[str], TextStream]:
    stream = TextStream(backend, backend.encode(prompt).ids, stops)
    pieces = []
    for token in backend.encode(text).ids:
        pieces.append(stream.push(token, **push))
        if stream.stopped_by is not None:
            break
    return pieces, stream


def _byte(value: int) -> str:
    """How a byte-level vocabulary writes a byte: printable Latin-1 is itself, the others follow from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(value) if value in kept else chr(0x100 + sum(other not in kept for other in range(value)))


@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
def test_any_text_round_trips_without_half_characters(backend, text, prompt):
    pieces, stream = _pieces(backend, text, prompt=prompt)
    assert "".join(pieces) + stream.finish() == text


def test_a_character_of_several_tokens_comes_whole(backend):
    pieces, _ = _pieces(backend, "a🦙b")
    assert [piece for piece in pieces if piece] == ["a", "🦙", "b"]


def test_a_character_that_stays_unfinished_is_a_mark_at_the_very_end(backend):
    stream = TextStream(backend, (), ())
    tokens = backend.encode("x🦙").ids
    assert "".join(stream.push(token) for token in tokens[:-1]) == "x"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@given(
    ids=st.lists(st.integers(1, 279), max_size=40),
    broken=st.lists(st.sampled_from([0x80, 0xA0, 0xCB, 0x8E, 0xE2, 0x82, 0xF0, 0x9F, 0x41]), max_size=40),
)
def test_any_tokens_make_the_text_that_decoding_all_of_them_makes(backend, ids, broken):
    # Bytes in an order that no text has, as weak models write them.
    tokens = [backend.token_to_id(_byte(byte)) for byte in broken] + ids
    stream = TextStream(backend, (), ())
    text = "".join(stream.push(token) for token in tokens) + stream.finish()
    assert text == backend.decode(tokens)


@pytest.mark.parametrize("prompt", ["hidden prompt \ufffd", "plain prompt", "ends in space "])
def test_the_prompt_never_comes_back_as_answer(backend, prompt):
    pieces, _ = _pieces(backend, "answer", prompt=prompt)
    assert "".join(pieces) == "answer"


def test_a_prompt_that_ends_within_a_character_is_completed_by_the_answer(backend):
    tokens = backend.encode("hidden 🦙 text").ids
    for cut in range(len(backend.encode("hidden ").ids), len(tokens)):
        stream = TextStream(backend, tokens[:cut], ())
        answer = "".join(stream.push(token) for token in tokens[cut:]) + stream.finish()
        assert answer in ("🦙 text"[-len(answer) :], "")
        assert "hidden" not in answer


def test_bytes_that_never_make_a_character_do_not_hold_the_text_for_ever(backend):
    stream = TextStream(backend, (), ())
    broken = backend.encode("🦙").ids[1]
    pieces = [stream.push(broken) for _ in range(30)]
    assert "".join(pieces)


def test_special_tokens_leave_no_text(backend):
    stream = TextStream(backend, (), ())
    assert stream.push(backend.token_to_id("<end>")) == ""


@pytest.mark.parametrize(
    ("text", "stops", "shown", "by"),
    [
        ("hello world", ["wor"], "hello ", "wor"),
        ("hello world", ["o w"], "hell", "o w"),
        ("aaab", ["aab"], "a", "aab"),
        ("one END two", ["END", "one E"], "", "one E"),
        ("abc", ["abcd"], "abc", None),
        ("ab ab abc", ["abc"], "ab ab ", "abc"),
        ("grüße 🦙 stop", ["🦙"], "grüße ", "🦙"),
    ],
)
def test_stop_strings_are_cut_and_what_comes_before_is_kept(backend, text, stops, shown, by):
    pieces, stream = _pieces(backend, text, stops)
    assert "".join(pieces) + (stream.finish() if by is None else "") == shown
    assert stream.stopped_by == by


def test_text_that_may_begin_a_stop_string_is_held_back(backend):
    pieces, stream = _pieces(backend, "xyz", ["yzq"])
    assert "".join(pieces) == "x"
    assert stream.finish() == "yz"


def test_before_the_minimum_length_stop_strings_are_text(backend):
    pieces, stream = _pieces(backend, "stop it", ["stop"], may_stop=False)
    assert "".join(pieces) == "stop it"
    assert stream.stopped_by is None


@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_shown_text_ends_where_the_first_stop_string_begins(backend, text, stops):
    pieces, stream = _pieces(backend, text, stops)
    shown = "".join(pieces) + ("" if stream.stopped_by is not None else stream.finish())
    hits = [text.find(stop) for stop in stops if stop in text]
    if not hits:
        assert shown == text
    else:
        assert stream.stopped_by is not None
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert text[len(shown) :].startswith(stream.stopped_by)
