"""llama.cpp's way to mix adapters, in requests and as the server's default."""

from typing import Annotated

from pydantic import Field

from service.api.wire.base import WireModel


class LoraScale(WireModel):
    """One expert by its number in `GET /lora-adapters`, and its weight."""

    id: int = Field(ge=0, le=2**31 - 1)
    scale: float


Lora = Annotated[list[LoraScale], Field(fail_fast=True, max_length=1024)]
