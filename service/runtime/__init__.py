"""Between event loop and engine: admission, the engine thread, cancellation, results back to the loop.

Requests are accepted on an event loop; one thread owns the engine and runs its steps; tokens cross back
batched, once a step. A request ends with exactly one terminal event, whatever happens to it. Imports the
engine and the scheduler; start at `runtime.py`.
"""

from service.engine.change import LiveChange, LiveTrial
from service.runtime.config import RuntimeConfig
from service.runtime.generation import Generation
from service.runtime.opening import open_runtime
from service.runtime.runtime import Runtime
from service.runtime.switch import RuntimeSwitch
from service.runtime.thread import StatsSink

__all__ = [
    "Generation",
    "LiveChange",
    "LiveTrial",
    "Runtime",
    "RuntimeConfig",
    "RuntimeSwitch",
    "StatsSink",
    "open_runtime",
]
