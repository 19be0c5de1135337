"""Errors of the offline library, one small tree.

    ExpertsError
    ├── CheckpointError        a model or adapter folder cannot be read: missing, corrupt, not safetensors
    ├── MismatchError          it can be read but does not fit: architecture, shape, vocabulary, tokenizer
    ├── MergeError             a merge was asked for with impossible hyper-parameters or inputs
    ├── CompressionError       a tensor cannot be factored: NaN, Inf, impossible rank or budget
    ├── RoutingError           a router cannot be trained, loaded or asked
    ├── EvaluationError        an evaluation cannot be run or read: overlapping data, a missing expert, a broken store
    └── BundleError            a bundle breaks its contract
        ├── CorruptBundleError   a digest, shape or dtype differs from the manifest
        ├── UnknownExpertError   the bundle has no expert of that name
        ├── DuplicateExpertError the bundle already has an expert of that name
        └── GenerationConflictError another generation than the expected one is current

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
