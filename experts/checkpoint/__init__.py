"""Where weights come from: bases, full fine-tunes and LoRA folders, opened lazily; and how one is written.

safetensors only, no pickle, no remote code. Knows nothing of merging or bundles. Start reading at
`model.py` (a full model), then `fine_tune.py` (what a fine-tune is) and `lora.py`; `storage.py` is the
file format and `writer.py` streams θ₀ + Δ into an ordinary Hugging Face folder.
"""

from experts.checkpoint.fine_tune import FineTune, FullFineTune
from experts.checkpoint.lora import LoraFineTune
from experts.checkpoint.model import Checkpoint
from experts.checkpoint.opening import open_fine_tune
from experts.checkpoint.writer import write_checkpoint

__all__ = [
    "Checkpoint",
    "FineTune",
    "FullFineTune",
    "LoraFineTune",
    "open_fine_tune",
    "write_checkpoint",
]
