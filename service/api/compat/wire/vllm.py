"""`POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`."""

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, StringConstraints

from service.api.wire.admin import ExpertName
from service.api.wire.base import Neutral, WireModel


class LoadBody(WireModel):
    """An adapter to load, and where it lies on the server."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"lora_name": "sql", "lora_path": "sql-lora", "load_inplace": False}]}
    )
    unsupported: ClassVar[Neutral] = {"is_3d_lora_weight": (False,)}

    lora_name: ExpertName
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4096)] = Field(
        description="relative to TWINSERVE_EXPERTS_ROOT, or absolute below it"
    )
    load_inplace: bool = Field(default=False, description="take the place of one that is loaded")


class UnloadBody(WireModel):
    """An adapter to unload."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "sql"}]})

    lora_name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    lora_int_id: int | None = Field(default=None, description="the name alone counts, as in vLLM")
