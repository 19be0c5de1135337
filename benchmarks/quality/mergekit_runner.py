"""Run merges with mergekit in its own environment: one process for all of them.

    python mergekit_runner.py JOBS.json

JOBS.json is a list of {"config": mergekit's configuration, "out": folder}. Imports nothing of this repository.
"""

import json
import sys
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config = MergeConfiguration.model_validate(job["config"])
        run_merge(config, job["out"], MergeOptions(copy_tokenizer=False, quiet=True))


if __name__ == "__main__":
    main()
