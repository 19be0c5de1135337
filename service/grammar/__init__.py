"""Constraints on a whole answer (`core.Constraint`), compiled by llguidance: which token may come next.

A constraint's text becomes the library's grammar (`definition.py`), held against bounds that keep compiling and
masking cheap (`bounds.py`). `Grammars` compiles on threads of its own and remembers; one `Grammar` starts a `Run`
for every sequence. Imports core and errors; knows no torch and no HTTP. Start at `compiler.py`.
"""

from service.grammar.compiler import Grammars
from service.grammar.grammar import Grammar, Run
from service.grammar.options import GrammarOptions

__all__ = ["Grammar", "GrammarOptions", "Grammars", "Run"]
