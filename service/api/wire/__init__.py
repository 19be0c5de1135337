"""Bodies as clients write and read them: OpenAI's fields, a few of vLLM's, and our documented extensions.

Requests: `base.py` (how strict), `request.py`, `sampling.py`, `completions.py`, `chat.py`, `routing.py`, `admin.py`;
with their answers `embeddings.py`, `tokenize.py`; `responses.py` with `response_input.py`.
Answers: `answers.py`, `response_answers.py`. Imports pydantic only; limits that an operator sets are checked in
`api/bounds.py`.
"""
