"""A router's two files: a description checked by its own model, and tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from experts.errors import RoutingError
from experts.routing.router import CONFIG_NAME, WEIGHTS_NAME

_Model = TypeVar("_Model", bound=BaseModel)


@runtime_checkable
class Packable(Protocol):
    """A router that can be asked for its files' contents, so that another can hold them among its own."""

    def packed(self) -> tuple[BaseModel, dict[str, Tensor]]:
        """What `Router.save` hands to `write_router`: router.json and the tensors of router.safetensors."""


def write_router(folder: Path, config: BaseModel, tensors: Mapping[str, Tensor]) -> None:
    """Write router.safetensors and router.json into an existing folder; fields that are None are left out."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_NAME)
    text = config.model_dump_json(indent=1, exclude_none=True)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def read_config(folder: Path, model: type[_Model]) -> _Model:
    """The description.

    Raises:
        RoutingError: it is missing or malformed.
    """
    path = folder / CONFIG_NAME
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RoutingError(f"{path}: not a router description ({error}); restore the file") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors.

    Raises:
        RoutingError: the file is missing or malformed.
    """
    path = folder / WEIGHTS_NAME
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RoutingError(f"{path}: not readable ({error}); restore the file") from error


def misfit(folder: Path, error: Exception) -> RoutingError:
    """What to raise where the tensors are not those that the description needs."""
    what = f"tensor {error} is missing" if isinstance(error, KeyError) else str(error)
    return RoutingError(f"{folder / WEIGHTS_NAME}: {what}; restore the file")
