"""Classification with a shared encoder: texts of concurrent requests, each with its own gates, in one pass.

`classifier.py` queues and batches, `model.py` routes and answers a batch, `encoder.py` adds exclusive vectors to
the unmodified Hugging Face encoder. Imports `service.gating`, `core` and `errors`, and experts.classification.
"""

from service.classify.classifier import Classifier, open_classifier
from service.classify.words import Classified, ClassifyRecorder, Text

__all__ = ["Classified", "Classifier", "ClassifyRecorder", "Text", "open_classifier"]
