"""How far a job is."""

from hypothesis import given
from hypothesis import strategies as st

from experts.registry.work import Step
from service.registrar.work.gauge import Gauge

STAGES = ("fetch", "check", "compress", "build", "route", "store", "try", "publish", "no such stage")


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    st.lists(st.tuples(st.sampled_from(STAGES), st.floats(0, 1))),
    st.floats(0, 99),
)
def test_percent_never_fall_and_stay_below_a_hundred(steps, reached):
    gauge = Gauge(reached)
    seen = [gauge.now().percent]
    for stage, share in steps:
        gauge.follow(Step(stage=stage, share=share))
        seen.append(gauge.now().percent)
        assert gauge.now().stage == stage
    assert seen == sorted(seen)
    assert seen[0] >= round(reached, 1)
    assert seen[-1] < 100


def test_what_is_left_is_told_by_what_was_done():
    clock = Clock()
    gauge = Gauge(clock=clock)
    assert gauge.now().eta_seconds is None
    gauge.at("check")  # 15 %; nothing was fetched
    clock.now = 10.0
    gauge.at("compress", 0.5, "model.layers.0.weight")  # 50 %
    progress = gauge.now()
    assert (progress.percent, progress.tensor) == (50.0, "model.layers.0.weight")
    assert progress.eta_seconds == round(10 / 35 * 50, 1)
