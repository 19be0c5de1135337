"""From a model folder to an engine: the one place that knows which part needs which."""

import logging
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from experts.routing import Router
from service.engine.correction import learn_correction
from service.engine.costs import measure_costs
from service.engine.engine import Engine
from service.engine.host_cache import HostCache
from service.engine.loader import ExpertSource, Loader
from service.engine.merged import MergedWeights, MixMode
from service.engine.model import ModelOptions, SharedModel
from service.engine.parts import EngineParts
from service.engine.residency import Residency
from service.engine.routing import Dispatcher, RoutingDefaults
from service.gating.slots import SlotPool
from service.scheduler.blocks import KvBlocks
from service.scheduler.catalogue import Catalogue
from service.scheduler.policy import Budget, Limits, Policy
from service.scheduler.scheduler import Scheduler

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Everything that an operator decides about an engine.

    Attributes:
        mode: how single patterns are served, see `MergedWeights`.
        merged_bytes: of materialised weights.
        single_pass: route prompts in the middle of their own prefill.
        host_cache_bytes: of experts that lost their slot; nothing is kept on a CPU, whose slots are host memory.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    limits: Limits = field(default_factory=lambda: Limits(32))
    budget: Budget = field(default_factory=Budget)
    policy: Policy = field(default_factory=Policy)
    routing: RoutingDefaults = field(default_factory=RoutingDefaults)
    prefix_cache: bool = True
    mode: MixMode = "factored"
    merged_bytes: int = 0
    single_pass: bool = False
    host_cache_bytes: int = 0


def assemble(
    path: Path,
    options: EngineOptions,
    router: Router | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pool: SlotPool,
    source: ExpertSource,
    executor: Executor,
    dtype: torch.dtype,
    device: torch.device,
    merging: Executor | None = None,
) -> Engine:
    """Load the shared model and put an engine around it; it has no experts yet.

    Args:
        path: the shared model's folder.
        source: where experts come from that have no slot.
        executor: loads experts, and makes materialised weights unless `merging` does; one torch thread each.

    Raises:
        ExpertRejectedError: the shared model cannot be served exactly.
    """
    spec = router.spec if router is not None else None
    model = SharedModel(path, options.model, dtype=dtype, device=device, spec=spec)
    host = HostCache(options.host_cache_bytes if device.type != "cpu" else 0)
    loader = Loader(model.bank, source, executor, host=host)
    scheduler: Scheduler

    residency = Residency(
        model.bank,
        pool,
        loader,
        lambda: [sequence.pattern for sequence in scheduler.running if sequence.pattern is not None],
        patience_seconds=options.policy.max_wait_seconds / 4,
    )
    kv = KvBlocks(model.cache.groups, prefix_cache=options.prefix_cache)
    scheduler = Scheduler(options.limits, kv, options.budget, options.policy, residency.ready)
    merging = merging or executor
    merged = None
    if options.mode == "merged" and model.native is None:
        _log.warning("mix mode merged needs compiled decoder layers; gates are served by factors")
    # Merged weights would be made of the matrices as they are stored, and answer a little differently.
    merge = options.mode != "factored" and options.merged_bytes and not options.model.int8
    if model.native is not None and merge:
        costs = measure_costs(model, merging) if options.mode == "auto" else None
        merged = MergedWeights(
            model.bank,
            model.native,
            merging,
            mode=options.mode,
            max_bytes=options.merged_bytes,
            costs=costs,
        )
    return Engine(
        EngineParts(
            model=model,
            scheduler=scheduler,
            dispatcher=Dispatcher(Catalogue(), router, options.routing),
            residency=residency,
            backend=tokenizer.backend_tokenizer,
            end_ids=end_ids(model, tokenizer),
            merged=merged,
            single_pass=options.single_pass,
            correction=learn_correction(model, tokenizer),
        )
    )


def end_ids(model: SharedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token id at which the model ends."""
    configured = model.model.generation_config.eos_token_id if model.model.generation_config else None
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return frozenset(int(i) for i in ids if i is not None)
