"""A router inside another's files: what it would write, as a mapping and tensors, and back."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from experts.routing.kinds import load_router
from experts.routing.router import CONFIG_NAME, WEIGHTS_NAME, Router
from experts.routing.storage import Packable


def pack(router: Router) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save` writes into router.json and router.safetensors; of a kind from elsewhere, by way of a folder."""
    if isinstance(router, Packable):
        config, tensors = router.packed()
        return config.model_dump(mode="json", exclude_none=True), tensors
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        router.save(folder)
        text = (folder / CONFIG_NAME).read_text(encoding="utf-8")
        return json.loads(text), load_file(folder / WEIGHTS_NAME)


def unpack(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
    """The router that was packed, of whatever kind.

    Raises:
        RoutingError: the kind is not installed, or its loader refuses what it is given.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / CONFIG_NAME).write_text(json.dumps(dict(config)), encoding="utf-8")
        save_file(dict(tensors), folder / WEIGHTS_NAME)
        return load_router(folder)
