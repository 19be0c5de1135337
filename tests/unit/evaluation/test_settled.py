"""Promise of early ends: cutting an answer where it is settled never changes its score."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.evaluation.scoring import score
from experts.evaluation.settled import settled

WORDS = st.sampled_from(["a", "b", "ab", "aunt", "mother", "grandmother", "six", " ", ".", "\n"])
REFERENCES = {"exact": "a b", "tokens": "a b ab", "mentions": "aunt / mother"}


@pytest.mark.parametrize("metric", list(REFERENCES))
@given(pieces=st.lists(WORDS, max_size=12))
def test_the_score_where_it_is_settled_is_the_final_one(metric: str, pieces: list[str]) -> None:
    reference = REFERENCES[metric]
    rule = settled(metric, reference)
    assert rule is not None
    text = " ".join(pieces) if metric == "tokens" else "".join(pieces)
    final = score(metric, [text], [reference]).mean
    for end in range(len(text) + 1):
        if rule(text[:end]):
            assert score(metric, [text[:end]], [reference]).mean == final
            return


def test_a_wrong_beginning_settles_an_exact_answer_and_half_a_character_does_not() -> None:
    rule = settled("exact", "año")
    assert rule is not None
    assert not rule(" a�")
    assert rule("b")


def test_a_metric_without_a_rule_is_never_settled() -> None:
    assert settled("bleu", "a") is None
