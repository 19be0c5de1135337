"""The eight tasks of the suite."""

from experts.classification.task import ClassificationTask
from experts.classification.tasks.glosses import definition, kind, scene
from experts.classification.tasks.names import language
from experts.classification.tasks.texts import sentiment, spam
from experts.classification.tasks.words import form, relation


def suite() -> tuple[ClassificationTask, ...]:
    """Tasks with label sets of their own; no input says which task it belongs to."""
    return (sentiment(), spam(), kind(), definition(), scene(), relation(), form(), language())
