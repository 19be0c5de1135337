"""`python -m benchmarks.api [contract] [schemathesis] [connections] [soak]`: all parts unless some are named.

Each part writes its figures into `results/api.json` when it ends and leaves those of the others. The server under
test serves a tiny family that is made on the spot, or `--bundle`. `contract` and `schemathesis` need the clients'
environment (`make clients`).
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.api import clients, connections, schema, soak
from benchmarks.api.figures import (
    PARTS,
    RESULTS,
    TITLE,
    command_of,
    of_connections,
    of_contract,
    of_schemathesis,
    of_soak,
)
from benchmarks.report import Figure, markdown, merge, show
from tests.contract.family import EMBEDDED, contract_family


def main() -> None:
    """Run the chosen parts; exit code 1 if a bound is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--bundle", type=Path, help="what is served; a tiny family if none is named")
    parser.add_argument("--clients", type=Path, default=Path(".twinserve/clients/bin/python"))
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=10, help="of the soak")
    parser.add_argument("--examples", type=int, default=200, help="schemathesis cases of an operation")
    parser.add_argument("--budget", type=int, default=900, help="seconds of schemathesis")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    chosen = arguments.parts or list(PARTS)
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in (part for part in PARTS if part in chosen):
            figures = _PARTS[part](arguments, Path(scratch))
            merge(arguments.out, command_of(part), figures, [command_of(part) for part in PARTS])
            arguments.out.with_suffix(".md").write_text(markdown(arguments.out, TITLE), encoding="utf-8")
            show(part, figures)
            missed += [figure.name for figure in figures if figure.met is False]
    if missed:
        sys.exit(f"not met: {', '.join(missed)}")


def _bundle(arguments: argparse.Namespace, scratch: Path) -> Path:
    if arguments.bundle is not None:
        return Path(arguments.bundle)
    made = scratch / "family"
    return made / "bundle" if made.exists() else contract_family(made).bundle


def _contract(arguments: argparse.Namespace, scratch: Path) -> list[Figure]:
    return of_contract(clients.run(arguments.clients), command_of("contract"))


def _schemathesis(arguments: argparse.Namespace, scratch: Path) -> list[Figure]:
    # The document's examples name what the embedded bundle has.
    family = contract_family(scratch / "embedded", "embedded", EMBEDDED)
    found = schema.run(
        arguments.clients,
        family.bundle,
        examples=arguments.examples,
        seconds=arguments.budget,
        experts_root=scratch / "embedded" / "fine-tunes",
    )
    if found.failures:
        print(found.report)
    return of_schemathesis(found, command_of("schemathesis"))


def _connections(arguments: argparse.Namespace, scratch: Path) -> list[Figure]:
    found = connections.run(_bundle(arguments, scratch), arguments.connections)
    return of_connections(found, command_of("connections"))


def _soak(arguments: argparse.Namespace, scratch: Path) -> list[Figure]:
    found = soak.run(_bundle(arguments, scratch), arguments.minutes * 60)
    return of_soak(found, command_of("soak"))


_PARTS: dict[str, Callable[[argparse.Namespace, Path], list[Figure]]] = {
    "contract": _contract,
    "schemathesis": _schemathesis,
    "connections": _connections,
    "soak": _soak,
}


if __name__ == "__main__":
    main()
