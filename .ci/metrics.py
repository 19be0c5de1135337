"""Check that what the deployment and the README name exists: metrics and settings.

    python .ci/metrics.py METRICS.txt RULES.yml...

Every metric that the Prometheus rules name must be one that the server exposes: an alert on a misspelt metric
never fires, and promtool cannot know. Every `TWINSERVE_…` variable in `deploy/`, the README and the container
files must be a setting.
"""

import re
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.settings import ENV_PREFIX, Settings

# Not after a colon: `instance:twinserve_…:rate5m` is what a recording rule makes.
NAME = re.compile(r"(?<![:\w])twinserve_[a-z0-9_]+")
VARIABLE = re.compile(r"\bTWINSERVE_[A-Z0-9_]+")
ROOT = Path(__file__).parents[1]


def exposed(text: str) -> set[str]:
    """Sample names of every family; a labelled one counts before it has a sample."""
    names: set[str] = set()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    for family in text_string_to_metric_families(text):
        names.update(family.name + suffix for suffix in suffixes.get(family.type, ("",)))
    return names


def strange_variables() -> list[str]:
    """`FILE: VARIABLE` for every variable with our prefix that no setting reads."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    deployed = [path for path in sorted((ROOT / "deploy").rglob("*")) if path.is_file()]
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "README.md", ROOT / "Dockerfile", ROOT / "docker-compose.yml", *deployed)
        for name in sorted(set(VARIABLE.findall(path.read_text(encoding="utf-8"))) - known)
    ]


def main(metrics: str, *rules: str) -> int:
    """Print what is missing; 1 if anything is."""
    known = exposed(Path(metrics).read_text(encoding="utf-8"))
    named = {name for path in rules for name in NAME.findall(Path(path).read_text(encoding="utf-8"))}
    problems = [f"named in the rules but not exposed: {name}" for name in sorted(named - known)]
    problems += [f"not a setting: {variable}" for variable in strange_variables()]
    if not named:
        problems.append("the rules name no metric")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(named)} metrics named in the rules, all exposed; every TWINSERVE_ variable is a setting")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
