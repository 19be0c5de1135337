"""Experts come and go while requests run: one catalogue for all servers, which each of them follows.

Between api and runtime: knows no HTTP. Start at `registrar.py`, what the API calls; `opening.py` opens catalogue
and files, `follower.py` keeps the runtime in step with them, `replica.py` tells live servers from dead ones, `work`
runs the jobs, in processes of their own.
"""

from service.registrar.checks import Canary, ChangeAsked, Registration, TrialAsked
from service.registrar.family import CatalogueFamily
from service.registrar.opening import Registry, catalogue_url, open_blobs, open_registry
from service.registrar.registrar import Registrar
from service.registrar.running import RunningRegistry
from service.registrar.status import ExpertView, RegistryState
from service.registrar.translate import job_error, translate

__all__ = [
    "Canary",
    "CatalogueFamily",
    "ChangeAsked",
    "ExpertView",
    "Registrar",
    "Registration",
    "Registry",
    "RegistryState",
    "RunningRegistry",
    "TrialAsked",
    "catalogue_url",
    "job_error",
    "open_blobs",
    "open_registry",
    "translate",
]
