"""Streams of questions on which a static router is wrong, from the embedded family's real features.

A stream says, question by question, what the router sees and what each arm's answer would be worth. Made of the
test questions, which no router was fitted on; none of them is in a stream's own check set. The router is the paper's,
without a guard, whatever kind the bundle has: what a guard turns away never comes to feedback.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.depth import _wording
from experts.bundle import Bundle
from experts.embedded.build import PROMPTS, EmbeddedRecipe
from experts.embedded.family import family
from experts.errors import RoutingError
from experts.routing import MlpRouter, Router, extract_features, load_prompts, render_prompts
from experts.routing.bandit import SHARED_ARM
from experts.routing.loading import load_model, load_tokenizer

WORDINGS = 5
TEST = 400
SHORT = 120
"""Questions of each task in the longer streams."""
CHECKED = 80
"""Last test questions of each task: kept out of the streams, for the check that nothing known got worse."""

Features = Mapping[str, Tensor]
"""`SPLIT.EXPERT.FORM` → (n, d) float32 in form chat or raw; `SPLIT.EXPERT.wording` → (n,) int64."""


@dataclass(frozen=True)
class Stream:
    """What comes, in order, and what it would be worth.

    Attributes:
        router: the static one.
        features: (n, d); worth: (n, experts + 1) chance that an arm's answer is good, the shared expert's last.
        known, known_labels: questions as the router was fitted for, to check afterwards.
        change: question from which on something is different; None from the beginning.
    """

    router: MlpRouter
    features: Tensor
    worth: Tensor
    known: Tensor
    known_labels: Tensor
    change: int | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        """Columns of `worth`."""
        return (*self.router.names, SHARED_ARM)


def features_of(bundle: Bundle, cache: Path, downloads: Path) -> Features:
    """Read from the cache, or extract and put there: a minute or two."""
    if cache.exists():
        return load_file(cache)
    spec = _served(bundle).spec
    model, tokenizer = load_model(bundle.shared_path), load_tokenizer(bundle.shared_path)
    found: dict[str, Tensor] = {}
    for skill in family():
        lines = load_prompts(PROMPTS / f"{skill.name}.jsonl")
        texts = {
            side: [line.prompt for line in lines if line.side == side][: EmbeddedRecipe.max_prompts]
            for side in ("train", "validation")
        }
        texts["test"] = [example.prompt for example in skill.load("test", downloads)[:TEST]]
        for side, prompts in texts.items():
            both = extract_features(model, render_prompts(tokenizer, prompts), spec)
            key = f"{side}.{skill.name}"
            found[f"{key}.chat"], found[f"{key}.raw"] = both[0::2].contiguous(), both[1::2].contiguous()
            found[f"{key}.wording"] = torch.tensor([_wording(skill, prompt) for prompt in prompts])
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, cache)
    return found


def names_in(features: Features) -> tuple[str, ...]:
    """The experts."""
    return tuple(sorted({key.split(".")[1] for key in features}))


@dataclass(frozen=True)
class Streams:
    """What streams are made of.

    Attributes:
        work: where fitted routers are kept.
    """

    bundle: Bundle
    features: Features
    work: Path

    def router(self, seed: int, forms: tuple[str, ...] = ("chat",), without: int = -1) -> MlpRouter:
        """The paper's router on the bundle's features, on these forms, without one wording; fitted once."""
        folder = self.work / f"router-{'-'.join(forms)}-{without}-{seed}"
        if folder.exists():
            return MlpRouter.load(folder)
        served = _served(self.bundle)

        def split(side: str) -> dict[str, Tensor]:
            return {
                name: torch.cat([self.asked(side, name, form, without) for form in forms])
                for name in names_in(self.features)
            }

        router = MlpRouter.fit(
            split("train"),
            split("validation"),
            served.spec,
            top_k=served.top_k,
            threshold=served.threshold,
            seed=seed,
        )
        folder.mkdir(parents=True)
        router.save(folder)
        return router

    def asked(self, side: str, name: str, form: str, without: int = -1) -> Tensor:
        """(n, d) of one expert's prompts, without one wording."""
        features = self.features
        return features[f"{side}.{name}.{form}"][features[f"{side}.{name}.wording"] != without]


def unseen_wording(streams: Streams, seed: int) -> Stream:
    """Every question comes in a wording that the router was fitted without; another one for each seed."""
    left_out, features = seed % WORDINGS, streams.features
    router = streams.router(seed, without=left_out)
    asked = [
        features[f"test.{name}.chat"][features[f"test.{name}.wording"] == left_out] for name in router.names
    ]
    known = [streams.asked("test", name, "chat", left_out)[-CHECKED:] for name in router.names]
    return _stream(router, asked, known, seed)


def drifted_wording(streams: Streams, seed: int) -> Stream:
    """Known wordings at first; from the second third on the one that the router was fitted without takes over."""
    left_out, features = seed % WORDINGS, streams.features
    router = streams.router(seed, without=left_out)
    usual, unusual = [], []
    for name in router.names:
        new = features[f"test.{name}.chat"][features[f"test.{name}.wording"] == left_out]
        unusual.append(new)
        usual.append(streams.asked("test", name, "chat", left_out)[: len(new)])
    known = [streams.asked("test", name, "chat", left_out)[-CHECKED:] for name in router.names]
    before = _stream(router, usual, known, seed)
    after = _stream(router, unusual, known, seed + 1)
    half = len(before.features) // 2
    # Half of the known ones, then both by turns, then the rest of the new ones.
    mixed = torch.stack([before.features[half:], after.features[: len(before.features) - half]], 1).flatten(
        0, 1
    )
    worth = torch.stack([before.worth[half:], after.worth[: len(before.worth) - half]], 1).flatten(0, 1)
    rest = len(before.features) - half
    return Stream(
        router,
        torch.cat([before.features[:half], mixed, after.features[rest:]]),
        torch.cat([before.worth[:half], worth, after.worth[rest:]]),
        before.known,
        before.known_labels,
        half,
    )


def drifted_form(streams: Streams, seed: int) -> Stream:
    """A router fitted on chats; from the second third on bare completions take over, step by step."""
    router = streams.router(seed)
    asked = [
        torch.stack([streams.features[f"test.{name}.{form}"][:SHORT] for form in ("chat", "raw")], 1)
        for name in router.names
    ]
    known = [streams.features[f"test.{name}.chat"][-CHECKED:] for name in router.names]
    stream = _stream(router, asked, known, seed)
    count = len(stream.features)
    begin = count // 3
    share = ((torch.arange(count) - begin) / begin).clamp(0, 1)
    raw = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share
    rows = torch.where(raw[:, None], stream.features[:, 1], stream.features[:, 0])
    return replace(stream, features=rows, change=begin)


def worse_expert(streams: Streams, seed: int) -> Stream:
    """After the first third one expert is replaced by one that is right once in ten; the shared expert, six times.

    Both figures are made up: they say what was logged, not what the embedded family is.
    """
    router = streams.router(seed, forms=("chat", "raw"))
    asked = [streams.features[f"test.{name}.chat"][:SHORT] for name in router.names]
    known = [streams.features[f"test.{name}.chat"][-CHECKED:] for name in router.names]
    stream = _stream(router, asked, known, seed)
    replaced, begin = seed % len(router.names), len(stream.features) // 3
    worth = stream.worth.clone()
    its = stream.worth[:, replaced] == 1
    worth[its, -1] = 0.6
    worth[its & (torch.arange(len(worth)) >= begin), replaced] = 0.1
    others = stream.known_labels != replaced
    return replace(
        stream,
        worth=worth,
        known=stream.known[others],
        known_labels=stream.known_labels[others],
        change=begin,
    )


STREAMS: Mapping[str, Callable[[Streams, int], Stream]] = {
    "unseen wording": unseen_wording,
    "drift to an unseen wording": drifted_wording,
    "an expert replaced by a worse one": worse_expert,
    "drift from chats to bare completions": drifted_form,
}


def _served(bundle: Bundle) -> Router:
    """The bundle's own router, whose features and defaults the streams' have.

    Raises:
        RoutingError: it has none.
    """
    router = bundle.router()
    if router is None:
        raise RoutingError(f"{bundle.path} has no router; feedback tunes one")
    return router


def _stream(router: MlpRouter, asked: list[Tensor], known: list[Tensor], seed: int) -> Stream:
    labels = torch.cat([torch.full((len(each),), index) for index, each in enumerate(asked)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    worth = torch.zeros(len(labels), len(router.names) + 1)
    worth[torch.arange(len(labels)), labels[order]] = 1.0
    known_labels = torch.cat([torch.full((len(each),), index) for index, each in enumerate(known)])
    return Stream(router, torch.cat(asked)[order], worth, torch.cat(known), known_labels)
