"""Studies as plain data: which systems are measured, on which experts and tasks. One study a file.

Each has `plan(settings, options)`, which gives the units that `experts.evaluation.runner` runs. Nothing here loads a
model. Start reading at `options.py`.
"""
