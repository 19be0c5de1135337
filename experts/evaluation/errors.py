"""What an evaluation refuses."""

from experts.errors import ExpertsError


class EvaluationError(ExpertsError):
    """An evaluation that cannot be run or read: its data overlap, an expert is missing, a store is broken."""
