"""From a family of experts, a bundle on disk or what a catalogue says, to a running runtime."""

import logging
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from experts.errors import ExpertsError
from experts.routing import among
from service.core import ExpertKey
from service.engine.assembly import assemble
from service.engine.background import give_way
from service.engine.engine import Engine
from service.engine.loader import BundleSource, loader_thread
from service.errors import ExpertRejectedError
from service.gating.slots import SlotPool
from service.runtime.config import RuntimeConfig
from service.runtime.family import Family
from service.runtime.runtime import Runtime
from service.runtime.thread import ENGINE_THREAD, StatsSink

_log = logging.getLogger(__name__)

_BESIDE_NICE = 5
"""Of an opening beside a running engine: it shall not take the engine's cores, nor for ever."""


def open_runtime(family: Family, config: RuntimeConfig, stats: StatsSink | None = None) -> Runtime:
    """Load a family's shared expert, experts and router, and start the engine thread. Blocks.

    All heavy work runs on threads of its own, which give way to an engine that runs already, and the calling
    thread is set to one torch thread: OpenMP keeps a pool of workers for every thread that ever ran something in
    parallel, and once the pools together outnumber the cores its workers sleep instead of spinning, which nearly
    doubles a decode step.

    Raises:
        ExpertRejectedError: the shared model cannot be served exactly.
        ExpertsError: the shared expert or the router is broken.
    """
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    config = replace(config, threads=threads)
    running = any(thread.name == ENGINE_THREAD for thread in threading.enumerate())
    nice = _BESIDE_NICE if running else 0
    # Making weights takes seconds; loads must not wait for it.
    beside = (loader_thread(), loader_thread())
    try:
        with ThreadPoolExecutor(1, "twinserve-opening", give_way, (threads, nice)) as pool:
            engine, tokenizer = pool.submit(_open, family, config, beside).result()
    except BaseException:
        for executor in beside:
            executor.shutdown(wait=False, cancel_futures=True)
        raise
    return Runtime(engine, tokenizer, family.name, config, stats, beside)


def _open(
    family: Family, config: RuntimeConfig, beside: tuple[Executor, Executor]
) -> tuple[Engine, PreTrainedTokenizerBase]:
    router = family.router()
    tokenizer = AutoTokenizer.from_pretrained(
        family.shared_path, local_files_only=True, trust_remote_code=False
    )
    options = config.engine
    longest = _context(family, options.model.max_tokens)
    options = replace(options, model=replace(options.model, max_tokens=longest))
    pool = SlotPool(
        max_experts=config.max_experts,
        max_bytes=config.max_expert_bytes,
        pinned=config.pinned_experts,
    )
    engine = assemble(
        family.shared_path,
        options,
        router,
        tokenizer,
        pool=pool,
        source=BundleSource(family.loader()),
        executor=beside[0],
        merging=beside[1],
        dtype=torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype),
        device=torch.device(_device(config.device)),
    )
    _register(family, engine, config.pinned_experts)
    engine.dispatcher.direct(among(router, engine.dispatcher.catalogue.current()))
    return engine, tokenizer


def _register(family: Family, engine: Engine, pinned: tuple[str, ...]) -> None:
    """Put every expert into the catalogue, and as many as there are slots onto the device, pinned ones first.

    Where all fit, one that cannot be read or that the model does not take is left out; where slots are limited
    nobody has looked at the others, and a broken one fails the requests that name it.
    """
    generations = family.generations()
    pool = engine.residency.pool
    for name in sorted(generations, key=lambda name: (name not in pinned, name)):
        key = ExpertKey(name, generations[name])
        if pool.room_for(len(pool) + 1, pool.used_bytes + pool.size(key)):
            try:
                resident = engine.model.bank.prepare(family.expert(name))
            except (ExpertRejectedError, ExpertsError) as error:
                _log.error("expert %s is not served: %s", name, error)
                continue
            engine.residency.publish(resident)
        engine.dispatcher.catalogue.switch([key])


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _context(family: Family, limit: int) -> int:
    config = AutoConfig.from_pretrained(family.shared_path, local_files_only=True).get_text_config()
    return min(int(getattr(config, "max_position_embeddings", limit)), limit)
