"""Which language a short name is in: the CLDR names of the `emoji` package, in Latin script."""

import json
from collections.abc import Iterator
from pathlib import Path

from experts.classification.task import ClassificationTask, Item
from experts.embedded.skills.packages import package_file
from experts.embedded.skills.translate import REQUIREMENT

LANGUAGES = ("de", "en", "es", "fr", "id", "it", "pt", "tr")
_TONES = frozenset(chr(code) for code in range(0x1F3FB, 0x1F400))


def language() -> ClassificationTask:
    """A name → its language, one of eight."""
    return ClassificationTask(
        name="language",
        description="language of the short name of a thing",
        source=f"Unicode CLDR short names ({REQUIREMENT})",
        licence="Unicode License v3; package BSD-3-Clause",
        labels=LANGUAGES,
        items=_names,
    )


def _names(downloads: Path) -> Iterator[Item]:
    for code in LANGUAGES:
        file_name = "emoji.json" if code == "en" else f"emoji_{code}.json"
        path = package_file("emoji", REQUIREMENT, "unicode_codes", file_name)
        table = json.loads(path.read_text(encoding="utf-8"))
        for character, entry in table.items():
            # A skin tone repeats a name five times over.
            if not _TONES.intersection(character):
                raw = entry["en"] if code == "en" else entry
                # One key for a thing in all languages: its names share a split.
                yield Item(str(raw).strip(":").replace("_", " "), code, character)
