"""Encoder classifiers in the manner of Twin-Merging: unknown task *and* unknown label set.

`task.py` and `tasks/` are the measured tasks, `train.py` makes an expert of each, `build.py` a classifier
bundle of experts, `bundle.py` reads one. Start at `bundle.py`. Imports the rest of `experts`, never `service`.
"""
