"""What a server does for its registry unasked, as an operator sees it."""

from pathlib import Path
from typing import Any

from tests.api.harness import ADMIN_KEY, eventually, serving
from tests.api.operators import Operator
from tests.fixtures.tiny import TinyFamily


def test_a_server_collects_by_itself_and_does_not_where_that_is_off(
    family: TinyFamily, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"admin_key": ADMIN_KEY, "state_dir": tmp_path / "state"}
    with serving(family.bundle, collect_seconds=0, **options) as served:
        admin = Operator(served)
        assert admin.ask("DELETE", "/experts/beta").status_code == 200
        assert state_of_beta(admin) == "ready"
    with serving(family.bundle, collect_seconds=0.05, **options) as served:
        admin = Operator(served)
        assert eventually(lambda: state_of_beta(admin) == "collected")
        [line] = [it for it in admin.get("/audit", target="beta")["data"] if it["action"] == "collect"]
        assert line["actor"] == "system"
        assert served.metric('twinserve_registry_collected_total{kind="generations"}') == 1
        assert admin.text(model="alpha")[1] == {"alpha": 1}


def state_of_beta(admin: Operator) -> str:
    [generation] = admin.get("/experts/beta/generations")["data"]
    return str(generation["state"])
