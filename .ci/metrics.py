"""Check that every metric that the Prometheus rules name is one that the server exposes.

    python .ci/metrics.py METRICS.txt RULES.yml...

An alert on a misspelt metric never fires, and promtool cannot know.
"""

import re
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

# Not after a colon: `instance:twinserve_…:rate5m` is what a recording rule makes.
NAME = re.compile(r"(?<![:\w])twinserve_[a-z0-9_]+")


def exposed(text: str) -> set[str]:
    """Sample names of every family; a labelled one counts before it has a sample."""
    names: set[str] = set()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    for family in text_string_to_metric_families(text):
        names.update(family.name + suffix for suffix in suffixes.get(family.type, ("",)))
    return names


def main(metrics: str, *rules: str) -> int:
    """Print what is missing; 1 if anything is."""
    known = exposed(Path(metrics).read_text(encoding="utf-8"))
    named = {name for path in rules for name in NAME.findall(Path(path).read_text(encoding="utf-8"))}
    missing = sorted(named - known)
    if missing or not named:
        problem = f"named in the rules but not exposed: {missing}" if named else "the rules name no metric"
        print(problem, file=sys.stderr)
        return 1
    print(f"{len(named)} metrics named in the rules, all exposed")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
