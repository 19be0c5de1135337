"""Rated answers → adjusted gates: what was routed (`memory`), versions on disk (`snapshots`), and the loop itself.

`loop.Feedback` is the place to start. Imports core, errors and the bandit of `experts.routing`; knows no HTTP.
"""

from service.feedback.loop import Applied, Feedback, FeedbackOptions, FeedbackSink, open_feedback
from service.feedback.memory import Memory
from service.feedback.snapshots import Snapshots

__all__ = [
    "Applied",
    "Feedback",
    "FeedbackOptions",
    "FeedbackSink",
    "Memory",
    "Snapshots",
    "open_feedback",
]
