"""`python -m benchmarks.registry [kills] [isolation] [convergence] [times] [tokens] [swap]`: all unless some named.

Each section writes its figures into `results/registry.json` when it ends and leaves those of the others. `times`,
`tokens` and `swap` serve `--bundle`, the others a tiny family that is made on the spot. PostgreSQL must be installed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.registry import convergence, isolation, kills, swap, times, tokens
from benchmarks.registry.figures import (
    RESULTS,
    SECTIONS,
    TITLE,
    command_of,
    of_convergence,
    of_isolation,
    of_kills,
    of_swap,
    of_times,
    of_tokens,
)
from benchmarks.report import Figure, markdown, merge, show


def main() -> None:
    """Run the chosen sections; exit code 1 if a bound is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--bundle", type=Path, default=Path(".twinserve/bundle"), help="of times and tokens")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=3, help="of isolation")
    parser.add_argument("--registrations", type=int, default=100, help="of convergence")
    parser.add_argument("--repeat", type=int, default=5, help="registrations of each kind of times")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of runs of tokens and swap")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    chosen = arguments.sections or list(SECTIONS)
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    missed = []
    for section in (section for section in SECTIONS if section in chosen):
        figures = _SECTIONS[section](arguments, command_of(section))
        merge(arguments.out, command_of(section), figures, [command_of(each) for each in SECTIONS])
        arguments.out.with_suffix(".md").write_text(markdown(arguments.out, TITLE), encoding="utf-8")
        show(section, figures)
        missed += [figure.name for figure in figures if figure.met is False]
    if missed:
        sys.exit(f"not met: {', '.join(missed)}")


_SECTIONS: dict[str, Callable[[argparse.Namespace, str], list[Figure]]] = {
    "kills": lambda given, command: of_kills(kills.run(given.kills), command),
    "isolation": lambda given, command: of_isolation(isolation.run(given.minutes * 60), command),
    "convergence": lambda given, command: of_convergence(convergence.run(given.registrations), command),
    "times": lambda given, command: of_times(times.run(given.bundle, given.repeat), command),
    "tokens": lambda given, command: of_tokens(tokens.run(given.bundle, given.rounds), command),
    "swap": lambda given, command: of_swap(swap.run(given.bundle, given.rounds), command),
}


if __name__ == "__main__":
    main()
