"""Runs inside OpenVINO's environment: batches in on standard input, answers out, one JSON line each.

Started as a file by `openvino.py`; it imports nothing of this project.
"""

import json
import os
import sys

import numpy as np
import openvino as ov
import openvino_genai as genai


def main() -> None:
    """Load model and adapter, say so, then answer batches until the input ends."""
    model, adapter = sys.argv[1:3]
    # Whatever the libraries print goes to the log, not between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    scheduling = genai.SchedulerConfig()
    scheduling.enable_prefix_caching = False
    scheduling.max_num_batched_tokens = 2048
    pipeline = genai.LLMPipeline(
        model,
        "CPU",
        adapters=genai.AdapterConfig(genai.Adapter(adapter), 1.0),
        scheduler_config=scheduling,
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        ids = np.array(batch["prompts"], dtype=np.int64)
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = batch["new_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        tokens = pipeline.generate(inputs, config).tokens
        print(json.dumps([list(map(int, row)) for row in tokens]), file=answers, flush=True)


if __name__ == "__main__":
    main()
