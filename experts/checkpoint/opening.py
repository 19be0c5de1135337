"""Open a folder as whatever kind of fine-tune it is."""

from pathlib import Path

from experts.checkpoint.compatibility import require_same_function, require_same_tokenizer
from experts.checkpoint.fine_tune import FineTune, FullFineTune
from experts.checkpoint.gguf_file import find_gguf
from experts.checkpoint.gguf_lora import GgufLora
from experts.checkpoint.lora import LoraFineTune
from experts.checkpoint.mark import refuse_mark
from experts.checkpoint.model import Checkpoint
from experts.errors import CheckpointError


def open_fine_tune(name: str, path: Path, base: Checkpoint) -> FineTune:
    """Open `path`, a PEFT LoRA folder (adapter_config.json), a full model (config.json) or a GGUF LoRA (one .gguf).

    Args:
        name: the expert's name.
        path: the folder.
        base: what it was trained from. For a LoRA without replaced modules only its shapes, config and
            tokenizer matter, so another model of the same form can stand in.

    Raises:
        CheckpointError: the folder cannot be read or used; names the file and the mend.
        MismatchError: it is not a fine-tune of `base`; names the tensor, field or file.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give the folder of a fine-tune or a PEFT LoRA")
    refuse_mark(path)
    fine_tune: FineTune
    if (path / "adapter_config.json").is_file():
        fine_tune = LoraFineTune(name, path, base)
    elif (path / "config.json").is_file():
        checkpoint = Checkpoint.open(path).streamed()
        require_same_function(checkpoint, base)
        fine_tune = FullFineTune(name, checkpoint, base)
    elif find_gguf(path) is not None:
        fine_tune = GgufLora(name, path, base)
    else:
        raise CheckpointError(
            f"{path} has neither adapter_config.json nor config.json nor a .gguf file; save the model or adapter "
            "there"
        )
    require_same_tokenizer(path, base.path)
    return fine_tune
