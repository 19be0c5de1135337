"""The registry's truth: which generation of each expert, which router and which bundle serve, at which revision.

One transaction for each change: check, write, count the revision up, write the audit log, tell listeners. Start
reading at `catalogue.py`, then `change.py`. May import the registry's records, the manifest's entries and errors;
knows no blob, no file of a bundle and no server.
"""

from experts.registry.catalogue.bundles import Absent
from experts.registry.catalogue.catalogue import Catalogue

__all__ = ["Absent", "Catalogue"]
