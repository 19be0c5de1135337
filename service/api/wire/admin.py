"""`POST /admin/experts`."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from service.api.wire.base import WireModel

Text = Annotated[str, StringConstraints(min_length=1)]
ExpertName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class RegisterBody(WireModel):
    """An expert to register from a folder on the server.

    Attributes:
        path: a full fine-tune or a LoRA folder, relative to the configured root or absolute below it.
        rank: singular values kept of each matrix; neither rank nor energy is the bundle's own choice.
        energy: or the share of the squared singular values kept.
        prompts: inputs of the expert's kind, to route to it; without any it serves by name and gates.
        expected_generation: refuse unless this generation is the current one (compare and swap).
        replace: allow a new generation of an expert that exists.
    """

    name: ExpertName
    path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    rank: int | None = Field(default=None, ge=1, le=65536)
    energy: float | None = Field(default=None, gt=0, le=1)
    prompts: Annotated[list[Text], Field(fail_fast=True)] = Field(default=[])
    expected_generation: int | None = Field(default=None, ge=1)
    replace: bool = False

    @model_validator(mode="after")
    def _one_size(self) -> "RegisterBody":
        if self.rank is not None and self.energy is not None:
            raise ValueError("give either 'rank' or 'energy', not both")
        return self

    def size(self) -> dict[str, Any]:
        """The given one of rank and energy."""
        return {key: value for key in ("rank", "energy") if (value := getattr(self, key)) is not None}
