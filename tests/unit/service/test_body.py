import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.body import json_depth, parse_json
from service.errors import InvalidRequestError, LimitExceededError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@given(JSON)
def test_depth_is_that_of_the_value_whatever_its_strings_hold(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert json_depth(text.encode("utf-8", "surrogatepass")) == depth(value)


@given(JSON)
def test_what_json_writes_is_read_back(value: object) -> None:
    assert parse_json(json.dumps(value).encode(), 256) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_refusal(body: bytes) -> None:
    with contextlib.suppress(InvalidRequestError):
        parse_json(body, 8)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_does_not_have_are_refused(constant: str) -> None:
    with pytest.raises(InvalidRequestError, match=constant):
        parse_json(f'{{"a": {constant}}}'.encode(), 8)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 400 + ".0"])
def test_a_number_beyond_the_largest_is_refused(number: str) -> None:
    with pytest.raises(InvalidRequestError, match="beyond the largest"):
        parse_json(f'{{"a": [{number}]}}'.encode(), 8)


@pytest.mark.parametrize(
    "body", [r'{"\ud800": 1}', r'{"a": ["\uDC00"]}', r'["\ud83d\ud83d\ude00"]', r'"\uD83D \uDE00"']
)
def test_half_a_surrogate_pair_is_no_text_wherever_it_stands(body: str) -> None:
    with pytest.raises(InvalidRequestError, match="half of a surrogate pair"):
        parse_json(body.encode(), 8)


def test_whole_surrogate_pairs_and_escaped_backslashes_are_text() -> None:
    assert parse_json(rb'{"\ud83d\ude00": "\\ud800"}', 8) == {"\U0001f600": r"\ud800"}


@pytest.mark.parametrize("codec", ["utf-16", "utf-32-le", "latin-1", "utf-8-surrogate"])
def test_another_encoding_than_utf_8_is_refused(codec: str) -> None:
    body = b'{"a": "\xed\xa0\x80"}' if codec == "utf-8-surrogate" else '{"a": "ü"}'.encode(codec)
    with pytest.raises(InvalidRequestError):
        parse_json(body, 8)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'a' is given twice"):
        parse_json(b'{"b": 1, "a": 1, "a": 2}', 8)


def test_the_limit_of_depth_is_exact() -> None:
    assert parse_json(b"[" * 8 + b"]" * 8, 8)
    with pytest.raises(LimitExceededError):
        parse_json(b"[" * 9 + b"]" * 9, 8)


@pytest.mark.parametrize("piece", [b'"', b'\\"', b'"\\', b"[", b'["', b"[]", b"\\", b'[\\"'])
def test_hostile_bodies_are_scanned_in_linear_time(piece: bytes) -> None:
    body = b"[" * 40 + b'"' + piece * (1_000_000 // len(piece))
    started = time.perf_counter()
    with pytest.raises(InvalidRequestError):
        parse_json(body, 32)
    assert time.perf_counter() - started < 5
