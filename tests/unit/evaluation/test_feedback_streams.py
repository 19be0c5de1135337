"""The feedback simulation in small, on made-up features: whatever router the bundle has."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.quality import feedback_stream
from benchmarks.quality.feedback import Prepared, figures
from benchmarks.quality.feedback_stream import STREAMS, WORDINGS, Streams
from experts.errors import RoutingError
from experts.routing import BanditSpec, FeatureSpec
from experts.routing.gaussian import GaussianRouter
from tests.unit.routing.prompts_like import NAMES, clusters

COUNTS = {"train": 20, "validation": 10, "test": 30}


def made_up() -> dict[str, torch.Tensor]:
    """Features as `features_of` names them; bare prompts lie apart from chats."""
    found = {}
    for seed, (side, count) in enumerate(COUNTS.items()):
        for name, rows in clusters(count, seed).items():
            found[f"{side}.{name}.chat"], found[f"{side}.{name}.raw"] = rows, rows + 20
            found[f"{side}.{name}.wording"] = torch.arange(count) % WORDINGS
    return found


def served() -> GaussianRouter:
    spec = FeatureSpec(layer=1, pooling="mean")
    return GaussianRouter.fit(clusters(20, 1), clusters(10, 2), spec, guard_rate=0.05)


@pytest.mark.parametrize("name", list(STREAMS))
def test_a_stream_runs_under_every_policy_beside_a_router_of_another_kind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback_stream, "CHECKED", 5)
    streams = Streams(SimpleNamespace(router=served), made_up(), tmp_path)
    prepared = Prepared(STREAMS[name](streams, 0))
    length = len(prepared.stream.features)
    runs = {policy: prepared.run(spec, 0) for policy, spec in (("static", None), ("feedback", BanditSpec()))}
    for run in runs.values():
        assert len(run.regret) == length
        assert (np.diff(run.regret) >= 0).all()
        assert 0 <= run.known <= 1
        assert run.explored == 0
    assert set(prepared.stream.arms) == {*NAMES, ""}
    told = figures({name: {policy: [run, run] for policy, run in runs.items()}})
    assert any("paired" in figure.name for figure in told)


def test_a_bundle_without_a_router_is_refused(tmp_path: Path) -> None:
    streams = Streams(SimpleNamespace(router=lambda: None, path=tmp_path), made_up(), tmp_path)
    with pytest.raises(RoutingError, match="no router"):
        streams.router(0)
