"""Sources of a registration, whatever they hold: changes of the base, and changes of the bundle's shared expert.

`open_source` takes a PEFT LoRA, a GGUF LoRA, a whole model or a ready expert. Start reading there.
"""

from experts.registry.importing.opening import mark_of, open_source
from experts.registry.importing.over_shared import OverShared

__all__ = ["OverShared", "mark_of", "open_source"]
