"""Promises of the metrics."""

import pytest

from experts.evaluation.scoring import (
    edit_distance,
    exact,
    mentions,
    number,
    score,
    summarise,
    tokens,
)


def test_exact_match_ignores_outer_space_only() -> None:
    assert exact(" perro\n", "perro") == 1.0
    assert exact("Perro", "perro") == 0.0


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("K AE T", "K AE T", 0), ("K AE", "K AE T", 1), ("G AE P S", "K AE T", 3), ("", "K", 1)],
)
def test_edit_distance_by_hand(left: str, right: str, distance: int) -> None:
    assert edit_distance(left.split(), right.split()) == distance


def test_token_score_is_one_minus_error_rate_and_never_negative() -> None:
    assert tokens("K AE", "K AE T") == pytest.approx(2 / 3)
    assert tokens("a b c d e f g h", "K AE T") == 0.0


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("Anna is the aunt of Ben, not his mother.", 1.0),
        ("Anna is the mother and the aunt.", 0.0),
        ("AUNT.", 1.0),
        ("The grandmother-in-law is an auntie.", 0.0),
        ("She is a grandmother, and an aunt.", 1.0),
        ("", 0.0),
    ],
)
def test_the_first_candidate_mentioned_as_a_whole_word_counts(prediction: str, right: float) -> None:
    assert mentions(prediction, "aunt / mother") == right


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("It lasted 3 hours, from 9 to 12.", 1.0),
        ("It lasted three hours.", 1.0),
        ("From 9 to 12, so 3.", 0.0),
        ("Someone went.", 0.0),
        ("13", 0.0),
    ],
)
def test_the_first_number_counts_in_digits_or_words(prediction: str, right: float) -> None:
    assert number(prediction, "3") == right


def test_standard_error_by_hand() -> None:
    got = summarise([1.0, 0.0, 1.0, 0.0])
    assert got.mean == 0.5
    assert got.standard_error == pytest.approx((1 / 3) ** 0.5 / 2)


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ValueError, match="bleurt"):
        score("bleurt", ["a"], ["a"])
