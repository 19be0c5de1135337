"""From a bundle on disk to a running runtime."""

import logging
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from experts.bundle import Bundle
from experts.routing import among
from service.core import ExpertKey
from service.engine.assembly import assemble
from service.engine.engine import Engine
from service.engine.loader import BundleSource, loader_thread
from service.errors import ExpertRejectedError
from service.gating.slots import SlotPool
from service.runtime.config import RuntimeConfig
from service.runtime.runtime import Runtime
from service.runtime.thread import StatsSink

_log = logging.getLogger(__name__)


def open_runtime(bundle: Bundle, config: RuntimeConfig, stats: StatsSink | None = None) -> Runtime:
    """Load a bundle's shared expert, experts and router, and start the engine thread. Blocks.

    All heavy work runs on threads of its own, and the calling thread is set to one torch thread: OpenMP
    keeps a pool of workers for every thread that ever ran something in parallel, and once the pools
    together outnumber the cores its workers sleep instead of spinning, which nearly doubles a decode step.

    Raises:
        ExpertRejectedError: the shared model cannot be served exactly.
        BundleError: a file of the bundle is broken.
    """
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    config = replace(config, threads=threads)
    # Making weights takes seconds; loads must not wait for it.
    beside = (loader_thread(), loader_thread())
    try:
        with ThreadPoolExecutor(1, "twinserve-opening", torch.set_num_threads, (threads,)) as pool:
            engine, tokenizer = pool.submit(_open, bundle, config, beside).result()
    except BaseException:
        for executor in beside:
            executor.shutdown(wait=False, cancel_futures=True)
        raise
    return Runtime(engine, tokenizer, bundle.manifest.name, config, stats, beside)


def _open(
    bundle: Bundle, config: RuntimeConfig, beside: tuple[Executor, Executor]
) -> tuple[Engine, PreTrainedTokenizerBase]:
    router = bundle.router()
    tokenizer = AutoTokenizer.from_pretrained(
        bundle.shared_path, local_files_only=True, trust_remote_code=False
    )
    options = config.engine
    longest = _context(bundle, options.model.max_tokens)
    options = replace(options, model=replace(options.model, max_tokens=longest))
    pool = SlotPool(
        max_experts=config.max_experts,
        max_bytes=config.max_expert_bytes,
        pinned=config.pinned_experts,
    )
    engine = assemble(
        bundle.shared_path,
        options,
        router,
        tokenizer,
        pool=pool,
        source=BundleSource(bundle.loader()),
        executor=beside[0],
        merging=beside[1],
        dtype=torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype),
        device=torch.device(_device(config.device)),
    )
    _register(bundle, engine, config.pinned_experts)
    engine.dispatcher.router = among(router, engine.dispatcher.catalogue.current())
    return engine, tokenizer


def _register(bundle: Bundle, engine: Engine, pinned: tuple[str, ...]) -> None:
    """Put every expert into the catalogue, and as many as there are slots onto the device, pinned ones first.

    Where all fit, one that the model does not take is left out; where slots are limited nobody has looked at
    the others, and a broken one fails the requests that name it.
    """
    names = bundle.expert_names()
    pool = engine.residency.pool
    for name in sorted(names, key=lambda name: (name not in pinned, name)):
        key = ExpertKey(name, bundle.entry(name).generation)
        if pool.room_for(len(pool) + 1, pool.used_bytes + pool.size(key)):
            try:
                resident = engine.model.bank.prepare(bundle.expert(name))
            except ExpertRejectedError as error:
                _log.error("expert %s is not served: %s", name, error)
                continue
            engine.residency.publish(resident)
        engine.dispatcher.catalogue.publish(key)


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _context(bundle: Bundle, limit: int) -> int:
    config = AutoConfig.from_pretrained(bundle.shared_path, local_files_only=True).get_text_config()
    return min(int(getattr(config, "max_position_embeddings", limit)), limit)
