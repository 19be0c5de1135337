"""`/tokenize` and `/detokenize`: the tokenizer that all experts share, by itself."""

from fastapi import APIRouter, Response

from service.api.backend import Backend
from service.api.bounds import at_most_items
from service.api.chat import rendering
from service.api.naming import Naming
from service.api.prompts import PromptEncoder
from service.api.refusals import NAMING, refusals
from service.api.tokens import TokenTexts
from service.api.wire.tokenize import (
    DetokenizeAnswer,
    DetokenizeBody,
    TokenizeAnswer,
    TokenizeBody,
    TokenPiece,
)
from service.errors import ModelNotFoundError
from service.settings import Settings

_REFUSALS = refusals(ModelNotFoundError, *NAMING)


def add_routes(
    router: APIRouter,
    backend: Backend,
    settings: Settings,
    encoder: PromptEncoder,
    texts: TokenTexts,
    naming: Naming,
) -> None:
    """Put `POST /tokenize` and `POST /detokenize` on `router`."""

    async def check(model: str | None) -> None:
        if model is not None:
            await naming.choose(model)

    @router.post("/tokenize", response_model=TokenizeAnswer, responses=_REFUSALS)
    async def tokenize(body: TokenizeBody) -> Response:
        """Encode a text or a chat of any length, as a generating endpoint would."""
        await check(body.model)
        if body.messages is not None:
            at_most_items(len(body.messages), settings.max_messages, "messages", "max_messages")
            how = rendering(body, special=body.special)
            ids = await encoder.chat_tokens(body.messages, how=how)
        else:
            text = body.prompt if body.prompt is not None else body.content or ""
            ids = await encoder.tokens(text, special=body.special)
        answer = TokenizeAnswer(
            count=len(ids),
            max_model_len=backend.max_context,
            tokens=[TokenPiece(id=token, piece=texts.text_of(token)) for token in ids]
            if body.with_pieces
            else list(ids),
            token_strs=encoder.pieces(ids) if body.return_token_strs else None,
        )
        return Response(answer.dump(), media_type="application/json")

    @router.post("/detokenize", response_model=DetokenizeAnswer, responses=_REFUSALS)
    async def detokenize(body: DetokenizeBody) -> Response:
        """Decode token ids; the text of whole characters comes back as it was encoded."""
        await check(body.model)
        text = await encoder.text(body.tokens, "tokens")
        return Response(DetokenizeAnswer(prompt=text, content=text).dump(), media_type="application/json")
