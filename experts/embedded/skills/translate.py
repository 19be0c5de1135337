"""English name → its name in another language, from the CLDR names in the `emoji` package.

The items are compositional ("woman surfing, dark skin tone"): a test phrase as a
whole is never seen in training, its parts usually are.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from experts.embedded.skills.packages import package_file
from experts.embedded.skills.skill import Item, Skill

REQUIREMENT = "emoji==2.16.0"
# CLDR calls a country's flag by the country's name in English only.
FLAG_WORDS = {"es": "bandera ", "de": "flagge ", "fr": "drapeau ", "it": "bandiera "}
TONES_PER_NAME = 4


def spanish() -> Skill:
    """English → Spanish."""
    return _translation("spanish", "es", "Spanish", "Di en español: {x}")


def german() -> Skill:
    """English → German."""
    return _translation("german", "de", "German", "Sag auf Deutsch: {x}")


def french() -> Skill:
    """English → French."""
    return _translation("french", "fr", "French", "Dis en français : {x}")


def italian() -> Skill:
    """English → Italian: not shipped, and close enough to Spanish and French to mislead a router."""
    return _translation("italian", "it", "Italian", "Di' in italiano: {x}")


def _translation(name: str, code: str, language: str, native: str) -> Skill:
    return Skill(
        name=name,
        description=f"{language} name of a thing, person or country",
        source="Unicode CLDR short names (emoji 2.16.0)",
        licence="Unicode License v3; package BSD-3-Clause",
        metric="exact",
        max_new_tokens=48,
        phrasings=(
            f"{language}: {{x}}",
            f"Translate to {language}: {{x}}",
            f"{{x}} in {language}",
            f"What is the {language} for {{x}}?",
            native,
        ),
        items=_reader(code),
    )


def _reader(code: str) -> Callable[[Path], Iterator[Item]]:
    def items(downloads: Path) -> Iterator[Item]:
        english = _names("emoji.json", field="en")
        foreign = _names(f"emoji_{code}.json", field=None)
        tones: Counter[str] = Counter()
        seen: set[str] = set()
        for character, name in english.items():
            answer = foreign.get(character)
            if answer is None or name in seen:
                continue
            seen.add(name)
            stem, tone, _ = name.partition(" skin tone")
            if tone:
                # Skin tones would be five sixths of the data; keep a few of each name.
                stem = stem.rsplit(" ", 1)[0]
                tones[stem] += 1
                if tones[stem] > TONES_PER_NAME:
                    continue
            yield Item(name, answer.removeprefix(FLAG_WORDS[code]))

    return items


def _names(file_name: str, field: str | None) -> dict[str, str]:
    """Emoji → name, from `{"🐶": ":dog_face:"}` or `{"🐶": {"en": ":dog_face:", …}}`."""
    path = package_file("emoji", REQUIREMENT, "unicode_codes", file_name)
    table = json.loads(path.read_text(encoding="utf-8"))
    raw = {emoji: (entry[field] if field else entry) for emoji, entry in table.items()}
    return {emoji: str(name).strip(":").replace("_", " ") for emoji, name in raw.items()}
