"""Why a job failed, as its client is told."""

from experts.errors import (
    CheckpointError,
    CompressionError,
    ExpertsError,
    MismatchError,
    RoutingError,
    SourceError,
)
from experts.registry.records import Job, JobFailure
from experts.registry.work import is_full
from service.errors import RequestFailedError, StorageFullError, TwinserveError
from service.registrar.translate import translate

_OF_THE_SOURCE = (CheckpointError, MismatchError, CompressionError, SourceError)
_SOURCES = ("path", "upload", "url")


def failure_of(job: Job, error: Exception) -> JobFailure:
    """The code, message and field of an error that ended a job."""
    if isinstance(error, ExpertsError):
        refused = translate(error)
        param = refused.param
        if param is None and isinstance(error, _OF_THE_SOURCE):
            param = next((it for it in _SOURCES if job.request.get(it) is not None), None)
        if param is None and isinstance(error, RoutingError) and job.request.get("prompts"):
            param = "prompts"
        return JobFailure(refused.code, refused.message, param)
    if isinstance(error, TwinserveError):
        return JobFailure(error.code, error.message, error.param)
    if is_full(error):
        full = StorageFullError(
            "The disk has no room for half-made files; make some, for instance with `twinserve registry gc`, and "
            "retry the job."
        )
        return JobFailure(full.code, full.message)
    told = RequestFailedError(
        "A fault while registering; the server's log tells more. Nothing was registered."
    )
    return JobFailure(told.code, told.message)
