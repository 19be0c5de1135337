"""An expert, or a mix of them, in the forms of other programs. Knows files; no server, no catalogue.

- `write_peft`: a PEFT LoRA over the shared expert, exact.
- `write_gguf`: the same for llama.cpp.
- `write_ready`: the files as they are served, for a server of the same bundle.
- `write_model`: a whole Hugging Face model with gates merged in.

What is written over the shared expert carries its mark (`experts.checkpoint.mark`), and `experts.registry.importing`
takes it back bit by bit.
"""

from experts.registry.exporting.gguf import write_gguf
from experts.registry.exporting.model import model_nbytes, write_model
from experts.registry.exporting.peft import write_peft
from experts.registry.exporting.ready import write_ready

__all__ = ["model_nbytes", "write_gguf", "write_model", "write_peft", "write_ready"]
