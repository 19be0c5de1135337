"""From a bundle on disk to a running runtime."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from experts.bundle import Bundle
from experts.routing import among
from service.engine.engine import Engine
from service.engine.model import SharedModel
from service.engine.routing import Dispatcher, RoutingDefaults
from service.errors import ExpertRejectedError
from service.runtime.config import RuntimeConfig
from service.runtime.runtime import Runtime
from service.runtime.thread import StatsSink
from service.scheduler.catalogue import Catalogue
from service.scheduler.scheduler import Budget, Scheduler

_log = logging.getLogger(__name__)

_LONGEST_DEFAULT = 4096
"""Context where neither the model nor the settings ask for less."""


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
    with ThreadPoolExecutor(1, "twinserve-opening", torch.set_num_threads, (threads,)) as pool:
        engine, tokenizer, end_ids = pool.submit(_open, bundle, config).result()
    return Runtime(engine, tokenizer, bundle.manifest.name, end_ids, config, stats)


def _open(bundle: Bundle, config: RuntimeConfig) -> tuple[Engine, PreTrainedTokenizerBase, frozenset[int]]:
    router = bundle.router()
    tokenizer = AutoTokenizer.from_pretrained(
        bundle.shared_path, local_files_only=True, trust_remote_code=False
    )
    model = SharedModel(
        bundle.shared_path,
        rows=config.max_batch,
        max_tokens=_context(bundle, config.max_context),
        dtype=torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype),
        device=torch.device(_device(config.device)),
        spec=router.spec if router is not None else None,
        pack_base=config.pack_base,
    )
    catalogue = _served(bundle, model)
    end_ids = _end_ids(model, tokenizer)
    engine = Engine(
        model,
        Scheduler(config.max_batch, Budget(config.prefill_step_tokens, config.prefill_chunk_tokens)),
        Dispatcher(
            catalogue,
            among(router, catalogue.current()),
            RoutingDefaults(config.router_top_k, config.router_threshold),
        ),
        tokenizer.backend_tokenizer,
        end_ids,
    )
    return engine, tokenizer, end_ids


def _served(bundle: Bundle, model: SharedModel) -> Catalogue:
    """Every expert that the model takes, in its bank and in the catalogue."""
    catalogue = Catalogue()
    for name in bundle.expert_names():
        try:
            resident = model.bank.prepare(bundle.expert(name))
        except ExpertRejectedError as error:
            _log.error("expert %s is not served: %s", name, error)
            continue
        model.bank.add(resident)
        catalogue.publish(resident.key)
    return catalogue


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _context(bundle: Bundle, limit: int | None) -> int:
    config = AutoConfig.from_pretrained(bundle.shared_path, local_files_only=True).get_text_config()
    own = int(getattr(config, "max_position_embeddings", _LONGEST_DEFAULT))
    return min(own, limit if limit is not None else _LONGEST_DEFAULT)


def _end_ids(model: SharedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.model.generation_config.eos_token_id if model.model.generation_config else None
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return frozenset(int(i) for i in ids if i is not None)
