"""What the shared expert makes of prompts, taken from the engine that runs it anyway."""

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch

from experts.errors import RoutingError
from experts.registry import needs_background
from experts.registry.work import write_profile
from experts.routing import Router, neutral_prompts, prompt_forms, render_prompts
from service.errors import InvalidRequestError
from service.registrar.work.live import Stage
from service.registrar.work.served import Steady

_log = logging.getLogger(__name__)


async def profile(live: Stage, prompts: Sequence[str], path: Path, steady: Steady) -> None:
    """Write the features of prompts, each in every form that it can reach the server in.

    Raises:
        TransitionError: the engine was another bundle's by then.
        InvalidRequestError: a prompt has no tokens, or there is no router to take features for.
    """
    try:
        rendered = await asyncio.to_thread(render_prompts, live.tokenizer, prompts)
    except RoutingError as error:
        raise InvalidRequestError(f"prompts: {error}.", param="prompts") from error
    with steady():
        features = torch.from_numpy(await live.features([tuple(ids) for ids in rendered]))
    await asyncio.to_thread(write_profile, path, features, len(prompt_forms(live.tokenizer)))


class Backgrounds:
    """Features of neutral prompts, which the first expert needs that joins a router by its weights.

    Taken once for a bundle and a kind of features, and kept on the disk.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = asyncio.Lock()

    async def of(self, live: Stage, router: Router | None, build_id: str, steady: Steady) -> Path | None:
        """The file of them; None where no expert would need any.

        Raises:
            TransitionError: the engine is another bundle's by now; no file is made of what it says.
            TwinserveError: the engine cannot answer.
            OSError: the folder cannot be written.
        """
        if router is None or not needs_background(router):
            return None
        spec = hashlib.sha256(router.spec.model_dump_json().encode()).hexdigest()[:16]
        path = self._folder / f"neutral-{build_id}-{spec}.safetensors"
        async with self._lock:
            if not path.is_file():
                # Another server may be at the same file.
                scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
                prompts = await asyncio.to_thread(neutral_prompts, live.tokenizer)
                try:
                    await profile(live, prompts, scratch, steady)
                    scratch.replace(path)
                finally:
                    scratch.unlink(missing_ok=True)
                _log.debug("neutral prompts are read for %s", build_id)
        return path
