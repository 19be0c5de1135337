"""Open a folder as whatever kind of fine-tune it is."""

from pathlib import Path

from experts.checkpoint.compatibility import require_same_function, require_same_tokenizer
from experts.checkpoint.fine_tune import FineTune, FullFineTune
from experts.checkpoint.lora import LoraFineTune
from experts.checkpoint.model import Checkpoint
from experts.errors import CheckpointError


def open_fine_tune(name: str, path: Path, base: Checkpoint) -> FineTune:
    """Open `path`, a PEFT LoRA folder (adapter_config.json) or a full model (config.json).

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
    is_adapter = (path / "adapter_config.json").is_file()
    if not is_adapter and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has neither adapter_config.json nor config.json; save the model or adapter there"
        )
    fine_tune: FineTune
    if is_adapter:
        fine_tune = LoraFineTune(name, path, base)
    else:
        checkpoint = Checkpoint.open(path)
        require_same_function(checkpoint, base)
        fine_tune = FullFineTune(name, checkpoint, base)
    require_same_tokenizer(path, base.path)
    return fine_tune
