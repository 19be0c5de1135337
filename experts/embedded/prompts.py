"""Writing the committed routing prompts, so that building a bundle needs no data packages.

`experts.routing.prompts.load_prompts` reads them. Lines are bare user messages:
the chat template comes on top. Keys of the test split never appear.
"""

import json
from pathlib import Path

from experts.embedded.skills.skill import Lesson, Split

COUNTS: tuple[tuple[Split, int], ...] = (("train", 200), ("validation", 100))


def write_prompts(skill: Lesson, folder: Path, downloads: Path) -> Path:
    """Write `<skill>.jsonl` from the skill's data package: the same lines every time."""
    lines = [
        json.dumps({"prompt": example.prompt, "answer": example.answer, "split": split}, ensure_ascii=False)
        for split, count in COUNTS
        for example in skill.load(split, downloads)[:count]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{skill.name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
