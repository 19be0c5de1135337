"""Errors of the server, one small tree: class → HTTP status → code.

    TwinserveError
    ├── InvalidRequestError        400  invalid_request
    │   ├── UnsupportedFieldError  400  unsupported_parameter
    │   ├── LimitExceededError     400  limit_exceeded
    │   │   ├── ContextLengthError 400  context_length_exceeded
    │   │   └── BodyTooLargeError  413  body_too_large
    │   └── UnknownExpertError     400  unknown_expert          (a gate names an expert that is not there)
    ├── AuthenticationError        401  invalid_api_key
    ├── AdminDisabledError         403  admin_disabled          (no admin key is configured)
    ├── FeedbackDisabledError      403  feedback_disabled       (TWINSERVE_FEEDBACK is not set)
    ├── PathNotAllowedError        403  path_not_allowed
    ├── SourceNotAllowedError      403  source_not_allowed      (a URL or address that registrations may not read)
    ├── ModelNotFoundError         404  model_not_found
    ├── ClassifierDisabledError    404  classifier_disabled     (no classifier bundle is served)
    ├── ExpertNotFoundError        404  expert_not_found
    ├── RequestNotFoundError       404  request_not_found       (no routed answer of that id is remembered)
    ├── RecordNotFoundError        404  record_not_found        (generation, job, alias, upload, bundle)
    ├── ConflictError              409  conflict
    ├── SlowRequestError           408  request_timeout         (its header or body took too long to arrive)
    ├── SlowClientError            408  client_too_slow         (its answer piled up unread)
    ├── AlreadyRatedError          409  already_rated           (an answer is rated once)
    ├── WrongStateError            409  wrong_state             (of a job, upload or generation)
    ├── OffsetConflictError        409  offset_conflict         (an upload goes on somewhere else)
    ├── PreconditionFailedError    412  precondition_failed     (If-Match names another generation)
    ├── UrlTooLongError            414  url_too_long
    ├── ExpertRejectedError        422  expert_rejected         (a checkpoint that cannot become an expert)
    │   └── FolderNotFoundError    422  folder_not_found        (nothing lies at a registration's path)
    ├── ExportRejectedError        422  export_rejected         (a format that cannot hold the expert)
    ├── SignatureRejectedError     422  signature_rejected      (missing, wrong, or by nobody who is trusted)
    ├── IdempotencyKeyError        422  idempotency_key_reused  (for another request)
    ├── QueueFullError             429  queue_full              (Retry-After)
    ├── RateLimitedError           429  rate_limit_exceeded     (of the caller's key or address; Retry-After)
    ├── HeaderTooLargeError        431  header_too_large
    ├── RequestFailedError         500  request_failed          (a fault inside this request alone)
    ├── EngineDeadError            503  engine_dead
    ├── ShuttingDownError          503  shutting_down           (Retry-After)
    ├── ExpertUnavailableError     503  expert_unavailable      (its factors cannot be loaded; Retry-After)
    ├── ExpertNotLoadedError       503  expert_not_loaded       (registered, but not on this replica yet; Retry-After)
    ├── RegistryUnavailableError   503  registry_unavailable    (catalogue or blob store cannot be used; Retry-After)
    ├── RegistrationTimeoutError   504  registration_timeout
    ├── StorageFullError           507  storage_full
    └── DeadlineExceededError      504  deadline_exceeded       (the request's own `timeout`)

Every message names the field, the limit and the mend. `param` is the field as the client wrote it.
"""

from typing import ClassVar


class TwinserveError(Exception):
    """Base of everything that the server refuses or reports on purpose.

    Attributes:
        status: HTTP status.
        code: stable machine-readable word.
        type: OpenAI's coarse error type.
        param: the request field at fault, if one is.
        retry_after: seconds after which trying again makes sense.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequestError(TwinserveError):
    """A field is missing, malformed or out of range."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class UnsupportedFieldError(InvalidRequestError):
    """A field that is known elsewhere but does nothing here: refused, not ignored."""

    code = "unsupported_parameter"


class LimitExceededError(InvalidRequestError):
    """A configured limit was exceeded."""

    code = "limit_exceeded"


class ContextLengthError(LimitExceededError):
    """Prompt and max_tokens do not fit the model's context."""

    code = "context_length_exceeded"


class BodyTooLargeError(LimitExceededError):
    """The HTTP body is larger than the limit."""

    status = 413
    code = "body_too_large"


class UnknownExpertError(InvalidRequestError):
    """A gate names an expert that is not registered."""

    code = "unknown_expert"


class AuthenticationError(TwinserveError):
    """The API key is missing or wrong."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class AdminDisabledError(TwinserveError):
    """The admin API has no key, so nobody may use it."""

    status = 403
    code = "admin_disabled"
    type = "permission_error"


class FeedbackDisabledError(TwinserveError):
    """The server was started without feedback."""

    status = 403
    code = "feedback_disabled"
    type = "permission_error"


class PathNotAllowedError(TwinserveError):
    """A server-side path outside the configured root."""

    status = 403
    code = "path_not_allowed"
    type = "permission_error"


class SourceNotAllowedError(TwinserveError):
    """A URL, or the address behind it, that registrations may not read."""

    status = 403
    code = "source_not_allowed"
    type = "permission_error"


class ModelNotFoundError(TwinserveError):
    """No model of that name is served."""

    status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class ClassifierDisabledError(TwinserveError):
    """The server was started without a classifier bundle."""

    status = 404
    code = "classifier_disabled"
    type = "invalid_request_error"


class ExpertNotFoundError(TwinserveError):
    """No expert of that name is registered."""

    status = 404
    code = "expert_not_found"
    type = "invalid_request_error"


class RequestNotFoundError(TwinserveError):
    """No answer of that id can be rated."""

    status = 404
    code = "request_not_found"
    type = "invalid_request_error"


class RecordNotFoundError(TwinserveError):
    """The registry has no generation, job, alias, upload or bundle of that id."""

    status = 404
    code = "record_not_found"
    type = "invalid_request_error"


class AlreadyRatedError(TwinserveError):
    """The answer was rated before; a rating counts once."""

    status = 409
    code = "already_rated"
    type = "invalid_request_error"


class ConflictError(TwinserveError):
    """The name is taken, or the expected generation is not the current one."""

    status = 409
    code = "conflict"
    type = "invalid_request_error"


class WrongStateError(TwinserveError):
    """A job, upload or generation is not in the state that the change needs."""

    status = 409
    code = "wrong_state"
    type = "invalid_request_error"


class OffsetConflictError(TwinserveError):
    """A part of an upload that does not go on where the upload ends."""

    status = 409
    code = "offset_conflict"
    type = "invalid_request_error"


class PreconditionFailedError(TwinserveError):
    """`If-Match` names another generation than the current one."""

    status = 412
    code = "precondition_failed"
    type = "invalid_request_error"


class ExpertRejectedError(TwinserveError):
    """A checkpoint that cannot become an expert of this bundle."""

    status = 422
    code = "expert_rejected"
    type = "invalid_request_error"


class ExportRejectedError(TwinserveError):
    """The format that is asked for cannot hold what the expert changes."""

    status = 422
    code = "export_rejected"
    type = "invalid_request_error"


class FolderNotFoundError(ExpertRejectedError):
    """There is no folder at the path of a registration."""

    code = "folder_not_found"


class SignatureRejectedError(TwinserveError):
    """A signature is missing, does not verify, or is by nobody who is trusted."""

    status = 422
    code = "signature_rejected"
    type = "invalid_request_error"


class IdempotencyKeyError(TwinserveError):
    """The idempotency key was sent with another request before."""

    status = 422
    code = "idempotency_key_reused"
    type = "invalid_request_error"


class QueueFullError(TwinserveError):
    """The waiting queue is full."""

    status = 429
    code = "queue_full"
    type = "rate_limit_error"


class SlowRequestError(TwinserveError):
    """The request did not arrive in time."""

    status = 408
    code = "request_timeout"
    type = "invalid_request_error"


class SlowClientError(TwinserveError):
    """The client did not read its answer; generating on would only pile it up."""

    status = 408
    code = "client_too_slow"
    type = "invalid_request_error"


class UrlTooLongError(TwinserveError):
    """The request line is longer than the limit."""

    status = 414
    code = "url_too_long"
    type = "invalid_request_error"


class RateLimitedError(TwinserveError):
    """The caller has used up what its key or address may use in a minute, or at once."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class HeaderTooLargeError(TwinserveError):
    """The header fields are larger, or more, than the limit."""

    status = 431
    code = "header_too_large"
    type = "invalid_request_error"


class RequestFailedError(TwinserveError):
    """A fault inside one request; the others go on."""

    status = 500
    code = "request_failed"


class EngineDeadError(TwinserveError):
    """The engine thread has ended; the server must be restarted."""

    status = 503
    code = "engine_dead"


class ShuttingDownError(TwinserveError):
    """The server is draining."""

    status = 503
    code = "shutting_down"


class RegistrationTimeoutError(TwinserveError):
    """A registration took longer than it may; nothing was registered."""

    status = 504
    code = "registration_timeout"


class StorageFullError(TwinserveError):
    """The disk or the object store has no room."""

    status = 507
    code = "storage_full"


class ExpertUnavailableError(TwinserveError):
    """A registered expert's factors cannot be loaded now; never answered with another expert instead."""

    status = 503
    code = "expert_unavailable"


class ExpertNotLoadedError(TwinserveError):
    """A registered expert has not reached this replica yet; never answered with another expert instead."""

    status = 503
    code = "expert_not_loaded"


class RegistryUnavailableError(TwinserveError):
    """The catalogue or the blob store cannot be used now; what is loaded still serves."""

    status = 503
    code = "registry_unavailable"


class DeadlineExceededError(TwinserveError):
    """The request did not end within the time that it set itself."""

    status = 504
    code = "deadline_exceeded"


def as_request_error(error: Exception) -> TwinserveError:
    """What a request is told of an error that ended it."""
    if isinstance(error, TwinserveError):
        return error
    return RequestFailedError(f"{type(error).__name__} while generating: {error}")
