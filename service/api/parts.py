"""What routes that generate are made of, put together once by the app."""

from dataclasses import dataclass

from service.api.backend import Backend
from service.api.compat.adapters import AdapterIds
from service.api.naming import Naming
from service.api.prompts import PromptEncoder
from service.api.tokens import TokenTexts
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Parts:
    """Backend and limits, what names mean, text to ids and back, and experts' numbers for llama.cpp's clients."""

    backend: Backend
    settings: Settings
    encoder: PromptEncoder
    texts: TokenTexts
    naming: Naming
    ids: AdapterIds
