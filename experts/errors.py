"""Errors of the offline library, one small tree.

    ExpertsError
    ├── CheckpointError        a model or adapter folder cannot be read: missing, corrupt, not safetensors
    ├── MismatchError          it can be read but does not fit: architecture, shape, vocabulary, tokenizer
    ├── MergeError             a merge was asked for with impossible hyper-parameters or inputs
    ├── CompressionError       a tensor cannot be factored: NaN, Inf, impossible rank or budget
    ├── RoutingError           a router cannot be trained, loaded or asked
    ├── ExportError            an expert cannot be written in the form that is asked for
    ├── EvaluationError        an evaluation cannot be run or read: overlapping data, a missing expert, a broken store
    ├── BundleError            a bundle breaks its contract
    │   ├── CorruptBundleError   a digest, shape or dtype differs from the manifest
    │   ├── UnknownExpertError   there is no expert of that name
    │   ├── DuplicateExpertError there is an expert of that name already
    │   └── GenerationConflictError another generation than the expected one is current
    └── RegistryError          the registry cannot do what was asked
        ├── CatalogueError         its database cannot be reached, read or written, or is of another version
        │   └── CatalogueFullError     its disk has no room
        ├── RecordNotFoundError    no generation, job, alias or upload of that id
        ├── TransitionError        the record's state does not allow it: a failed generation cannot go live
        │   ├── RegistryFullError      as many jobs wait as may
        │   └── OffsetError            a part of an upload that does not go on where the upload ends
        ├── IdempotencyError       the idempotency key was used for another request
        ├── JobLostError           the job went to another worker, or was cancelled; its result counts for nothing
        ├── StaleRouterError       the router was fitted on one that is not the current one any more
        ├── BlobError              the blob store cannot be reached or refuses
        │   ├── MissingBlobError     nothing of that digest is stored
        │   ├── CorruptBlobError     what is stored differs from its digest
        │   └── StorageFullError     no room for it
        ├── SourceError            where an expert should come from is refused: URL, address, file, size
        │   ├── SourceTooLargeError    more bytes than one source may have
        │   └── SourceUnavailableError nothing usable answers at its URL, or not in time
        └── SignatureError         a signature is missing, wrong, or by nobody who is trusted

Every message names the file, tensor or field, what is wrong with it and how to mend it.
"""


class ExpertsError(Exception):
    """Base of everything that `experts` raises on purpose."""


class CheckpointError(ExpertsError):
    """A model or adapter folder is missing, truncated, or in a format that is not accepted."""


class MismatchError(ExpertsError):
    """A checkpoint does not fit the base or the bundle."""


class MergeError(ExpertsError):
    """Impossible merge inputs or hyper-parameters."""


class CompressionError(ExpertsError):
    """A tensor that cannot be factored, or a rank or budget that cannot be met."""


class RoutingError(ExpertsError):
    """A router that cannot be trained, loaded or asked."""


class ExportError(ExpertsError):
    """An expert cannot be written in the form that is asked for; says which other form can hold it."""


class EvaluationError(ExpertsError):
    """An evaluation that cannot be run or read: its data overlap, an expert is missing, a store is broken."""


class BundleError(ExpertsError):
    """A bundle that breaks its contract."""


class CorruptBundleError(BundleError):
    """A file whose digest, shape or dtype differs from the manifest."""


class UnknownExpertError(BundleError):
    """No expert of that name."""


class DuplicateExpertError(BundleError):
    """An expert of that name exists already."""


class GenerationConflictError(BundleError):
    """The expert's current generation is not the one that the caller meant to replace."""


class RegistryError(ExpertsError):
    """The registry cannot do what was asked."""


class CatalogueError(RegistryError):
    """The catalogue's database cannot be reached, read or written, or its schema is of another version."""


class CatalogueFullError(CatalogueError):
    """The disk of the catalogue's database has no room; nothing was written."""


class RecordNotFoundError(RegistryError):
    """No generation, job, alias or upload of that id."""


class TransitionError(RegistryError):
    """The record's state does not allow the change."""


class RegistryFullError(TransitionError):
    """As many jobs run or wait as may."""


class OffsetError(TransitionError):
    """A part of an uploaded file does not go on where the file ends."""


class IdempotencyError(RegistryError):
    """The idempotency key was used for another request before."""


class JobLostError(RegistryError):
    """The job belongs to another worker by now, or has ended; nothing of this attempt counts."""


class StaleRouterError(RegistryError):
    """The router was made from one that is not current any more; make it again."""


class BlobError(RegistryError):
    """The blob store cannot be reached, or refuses."""


class MissingBlobError(BlobError):
    """Nothing of that digest is stored."""


class CorruptBlobError(BlobError):
    """What is stored differs from its digest."""


class StorageFullError(BlobError):
    """There is no room for it."""


class SourceError(RegistryError):
    """Where an expert should come from is refused: its URL, address, files or size."""


class SourceTooLargeError(SourceError):
    """A source has more bytes than one may have."""


class SourceUnavailableError(SourceError):
    """Nothing usable answers at a source's URL, or not in time."""


class SignatureError(RegistryError):
    """A signature is missing, does not verify, or is by nobody who is trusted."""
