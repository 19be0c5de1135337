"""HTTP: app factory, wire models, one file a resource. Imports registrar, runtime, core, errors; never torch.

Start at `app.py` (what is mounted where), then `completions.py` (a request from body to answer). A body
becomes a wire model (`wire/`), that becomes domain requests (`plan.py`), their events become an answer
(`generation.py`, `shapes.py`, `sse.py`). What the layer needs of the runtime is written down in `backend.py`.
"""
