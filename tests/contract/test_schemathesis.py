"""schemathesis over our own OpenAPI document, for a bounded time: nothing undocumented, nothing of 5xx."""

import sys
from pathlib import Path

import pytest

from benchmarks.api import schema
from tests.contract.family import EMBEDDED, contract_family


@pytest.mark.timeout(900)
def test_the_document_is_kept(tmp_path: Path) -> None:
    family = contract_family(tmp_path, "embedded", EMBEDDED)
    found = schema.run(
        Path(sys.executable), family.bundle, examples=10, seconds=60, experts_root=tmp_path / "fine-tunes"
    )
    assert not found.failures, found.report
    assert found.operations >= 20
    assert found.links >= 5
    assert found.cases >= 100
    assert found.accepted >= found.operations
