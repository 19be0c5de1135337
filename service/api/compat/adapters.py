"""Experts as other servers number them: integer ids, scales, and llama.cpp's mix for requests that name none."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from service.api.naming import check_weight
from service.api.wire.lora import LoraScale
from service.api.wire.sampling import SamplingBody
from service.errors import InvalidRequestError, UnknownExpertError

if TYPE_CHECKING:
    from service.api.parts import Parts

B = TypeVar("B", bound=SamplingBody)


class AdapterIds:
    """An integer for every expert, by its name, as long as the process lives.

    Names get the next free numbers when they are first seen, in the order of the alphabet; the experts that are
    there when the server starts are thus 0, 1, 2, …. A retired expert's number is never given to another one, and
    the same name that is registered again has the same number: ids that a client remembers do not shift.

    Args:
        names: every expert that can be named now.
    """

    def __init__(self, names: Callable[[], Collection[str]]) -> None:
        self._names = names
        self._ids: dict[str, int] = {}
        self.current()

    def current(self) -> dict[int, str]:
        """Number → expert, of those that are served, ascending."""
        served = self._names()
        for name in sorted(set(served) - self._ids.keys()):
            self._ids[name] = len(self._ids)
        return {number: name for name, number in self._ids.items() if name in served}

    def gates(self, scales: Sequence[LoraScale], max_gate: float, param: str = "lora") -> dict[str, float]:
        """Scales by number → weights by expert; a scale of 0 is the same as none.

        Args:
            max_gate: the largest absolute weight.
            param: the field that holds the scales; empty where they are the body.

        Raises:
            UnknownExpertError: no expert has that number.
            InvalidRequestError: a number is given twice.
            LimitExceededError: a scale is beyond `max_gate`.
        """
        current = self.current()
        gates: dict[str, float] = {}
        for index, one in enumerate(scales):
            place = f"{param}[{index}]"
            name = current.get(one.id)
            if name is None:
                raise UnknownExpertError(
                    f"{place}.id: no adapter has the id {one.id}; GET /lora-adapters lists them.",
                    param=f"{place}.id",
                )
            if name in gates:
                raise InvalidRequestError(f"{place}.id: {one.id} is given twice.", param=f"{place}.id")
            check_weight(f"{place}.scale", one.scale, max_gate)
            gates[name] = one.scale
        return {name: scale for name, scale in gates.items() if scale}


class DefaultMix:
    """llama.cpp's global scales: the gates of its own routes' requests that name none. Replaced as a whole.

    Attributes:
        gates: None leaves those requests to the router, as at the start.
    """

    def __init__(self) -> None:
        self.gates: Mapping[str, float] | None = None

    def given(self, served: Collection[str]) -> dict[str, float] | None:
        """The gates of a request that names none.

        Raises:
            UnknownExpertError: an expert of the mix was retired since; it is not left out in silence.
        """
        if self.gates is None:
            return None
        for name in self.gates:
            if name not in served:
                raise UnknownExpertError(
                    f"The server's default scales name the expert {name!r}, which was retired: send 'lora' with "
                    "the request, or have an operator set the scales anew (POST /lora-adapters).",
                    param="lora",
                )
        return dict(self.gates)


async def with_lora(body: B, parts: "Parts") -> B:
    """A body whose `lora` has become `gates`; any other as it is.

    Raises:
        ModelNotFoundError, ExpertNotLoadedError: `model` names nothing that is served, or not here yet.
        InvalidRequestError: `lora` with a model that names its experts itself, or with a number given twice.
        UnknownExpertError, LimitExceededError: as `AdapterIds.gates`.
    """
    if not body.lora:
        return body
    await parts.naming.choose(body.model)
    if body.model != parts.backend.bundle_name:
        raise InvalidRequestError(
            f"'lora' mixes experts itself: send it with model {parts.backend.bundle_name!r}, not {body.model!r}.",
            param="lora",
        )
    gates = parts.ids.gates(body.lora, parts.settings.max_gate)
    return body.model_copy(update={"gates": gates, "lora": []})
