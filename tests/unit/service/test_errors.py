import inspect
import re

import pytest

from service import errors
from service.api.errors import error_body, error_response, field_name
from service.errors import TwinserveError

ALL = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, TwinserveError) and cls is not TwinserveError
]


def drawn() -> dict[str, tuple[int, str]]:
    """Class → status and code, from the tree in the module's docstring."""
    rows = re.findall(r"─ (\w+Error)\s+(\d{3})  (\w+)", errors.__doc__ or "")
    return {name: (int(status), code) for name, status, code in rows}


def test_the_drawn_tree_is_the_real_one() -> None:
    assert drawn() == {cls.__name__: (cls.status, cls.code) for cls in ALL}


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_has_the_openai_shape_and_its_status(cls: type[TwinserveError]) -> None:
    error = cls("what and how to mend it", param="field", retry_after=0.2)
    answer = error_response(error)
    assert answer.status_code == cls.status
    assert error_body(error) == {
        "error": {"message": "what and how to mend it", "type": cls.type, "param": "field", "code": cls.code}
    }
    assert answer.headers["retry-after"] == "1"
    assert ("www-authenticate" in answer.headers) == (cls.status == 401)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_type_fits_the_status(cls: type[TwinserveError]) -> None:
    assert (cls.type == "server_error") == (cls.status >= 500)


def test_codes_are_distinct() -> None:
    assert len({cls.code for cls in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("location", "name"),
    [
        (("model",), "model"),
        (("messages", 0, "content"), "messages[0].content"),
        (("messages", 1, "content", "[2].type"), "messages[1].content[2].type"),
        ((0, "a"), "[0].a"),
        ((), None),
    ],
)
def test_a_place_reads_as_the_client_wrote_it(location: tuple[int | str, ...], name: str | None) -> None:
    assert field_name(location) == name
