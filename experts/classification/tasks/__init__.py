"""The measured tasks, each with its own label set; `suite.py` lists them."""
