"""Promises of normalised rows."""

import pytest

from experts.evaluation.scoring import Score
from experts.evaluation.table import method_row


def test_scores_are_normalised_by_the_tasks_own_expert() -> None:
    experts = {"a": Score(0.8, 0.02, 200), "b": Score(0.5, 0.03, 200)}
    row = method_row("merge", "", 0, {"a": Score(0.4, 0.02, 200), "b": Score(0.5, 0.03, 200)}, experts)
    assert [result.normalised for result in row.results] == [50.0, 100.0]
    assert row.average == 75.0
    assert row.average_error == pytest.approx((2.5**2 + 6.0**2) ** 0.5 / 2)


def test_an_expert_that_scores_nothing_cannot_be_a_yardstick() -> None:
    with pytest.raises(ValueError, match="'a'"):
        method_row("merge", "", 0, {"a": Score(0.1, 0, 9)}, {"a": Score(0.0, 0, 9)})
