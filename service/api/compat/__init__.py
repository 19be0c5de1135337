"""Other servers' routes, each mapped onto the same domain objects in one thin file.

| route | file | becomes |
| --- | --- | --- |
| vLLM's `/v1/load_lora_adapter`, `/v1/unload_lora_adapter` | `vllm.py` | the registrar |
| llama.cpp's `/lora-adapters`, `/completion`, `/props`; the field `lora` of `/v1` | `llamacpp.py` | gates |
| LoRAX's `/generate`, `/generate_stream`, `/`, `/info` | `lorax.py` | gates |

Start with the docstring of the file, which lists what is different from the original. A body becomes one of ours
(`running.py`), so that every check and limit is the same; refusals are told of the client's own fields and, where its
client reads nothing else, in its own shape (`errors.py`). `adapters.py` gives experts numbers.
"""
