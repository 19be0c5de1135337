"""The library's errors as ones that a client understands, and a job's failure as the error that it was."""

import contextlib
from collections.abc import Iterator

from experts import errors as library
from experts.registry.records import Job
from service import errors
from service.errors import TwinserveError

_RETRY_SECONDS = 1.0


@contextlib.contextmanager
def translated(*, precondition: bool = False, submitting: bool = False) -> Iterator[None]:
    """Raise the library's errors as the server's.

    Args:
        precondition: the expected generation came from `If-Match`.
        submitting: an expert that is missing is a conflict with what was expected, not a wrong address.
    """
    try:
        yield
    except library.ExpertsError as error:
        raise translate(error, precondition=precondition, submitting=submitting) from error


def translate(
    error: library.ExpertsError, *, precondition: bool = False, submitting: bool = False
) -> TwinserveError:
    """What a client is told of an error of the library."""
    message = f"{error}."
    if isinstance(error, library.GenerationConflictError):
        if precondition:
            return errors.PreconditionFailedError(message, param="If-Match")
        return errors.ConflictError(message, param="expected_generation")
    if isinstance(error, library.UnknownExpertError):
        if submitting:
            return errors.ConflictError(message, param="expected_generation")
        return errors.ExpertNotFoundError(message)
    if isinstance(error, library.DuplicateExpertError):
        return errors.ConflictError(message, param="name")
    return _by_kind(error, message)


def _by_kind(error: library.ExpertsError, message: str) -> TwinserveError:
    """Errors that mean the same wherever they come from."""
    match error:
        case library.RegistryFullError():
            told = f"{error} (TWINSERVE_MAX_REGISTRATIONS)."
            return errors.QueueFullError(told, retry_after=10.0)
        case library.IdempotencyError():
            return errors.IdempotencyKeyError(message, param="Idempotency-Key")
        case library.RecordNotFoundError():
            return errors.RecordNotFoundError(message)
        case library.OffsetError():
            return errors.OffsetConflictError(message, param="offset")
        case library.TransitionError() | library.JobLostError() | library.StaleRouterError():
            return errors.WrongStateError(message)
        case library.StorageFullError():
            return errors.StorageFullError(message)
        case library.CatalogueFullError():
            return errors.StorageFullError(
                "The disk of the registry's catalogue has no room, so nothing can be changed; what is loaded still "
                "serves. Make some, and try again."
            )
        case library.CatalogueError() | library.BlobError():
            # What the database or the store says of itself may hold addresses: the log's business.
            return errors.RegistryUnavailableError(
                "The registry cannot be used now, the server's log says why; what is loaded still serves. "
                "Try again later.",
                retry_after=_RETRY_SECONDS,
            )
        case library.SourceTooLargeError():
            return errors.BodyTooLargeError(message)
        case library.SourceUnavailableError():
            return errors.ExpertRejectedError(message, param="url")
        case library.SourceError():
            return errors.SourceNotAllowedError(message)
        case library.SignatureError():
            return errors.SignatureRejectedError(message, param="signature")
        case library.BundleError():
            return errors.InvalidRequestError(message)
        case library.ExportError():
            return errors.ExportRejectedError(message, param="format")
        case _:
            return errors.ExpertRejectedError(message)


def job_error(job: Job) -> TwinserveError:
    """Why a job ended without success, as the error that its request would have got at once."""
    failure = job.failure
    if failure is None:
        return errors.WrongStateError(f"The job {job.id} was {job.state}.")
    kind = _by_code(TwinserveError, failure.code) or errors.RequestFailedError
    later = _RETRY_SECONDS if kind.status in (429, 503) else None
    return kind(failure.message, param=failure.param, retry_after=later)


def _by_code(kind: type[TwinserveError], code: str) -> type[TwinserveError] | None:
    for known in kind.__subclasses__():
        if known.code == code:
            return known
        found = _by_code(known, code)
        if found is not None:
            return found
    return None
