"""HTTP: app factory, wire models, one file a resource. Imports registrar, runtime, core, errors; never torch.

Start at `app.py` (what is mounted where), then `completions.py` (a request from body to answer). A body
becomes a wire model (`wire/`), that becomes domain requests (`plan.py`, with `naming.py`, `bounds.py` and, for chats,
`template.py`), their events become an answer (`generate.py`, `completion_shape.py`, `chat_shape.py` with
`call_reader.py`, `sse.py`). What the layer needs of the runtime is written down in `backend.py`.
"""
