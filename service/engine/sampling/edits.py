"""Changes to logits before the choice: bias, penalties, forbidden tokens, processors; many rows at once."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.sampling.state import NotFiniteError, RowState
from service.errors import InvalidRequestError


def edit(logits: Tensor, rows: Sequence[RowState]) -> dict[int, Exception]:
    """Apply every row's edits, in place. The order is `logit_bias`, repetition, frequency and presence
    penalties, tokens that must not come yet, processors.

    Args:
        logits: (rows, vocabulary) float32, contiguous.

    Returns:
        Row index → why the row cannot be sampled; its logits are then of no use.
    """
    errors: dict[int, Exception] = {}
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    for row, state in enumerate(rows):
        try:
            state.check(logits.shape[-1])
            if not finite[row]:
                raise NotFiniteError("the model gave NaN or infinite logits")
        except Exception as error:  # noqa: BLE001 belongs to this row alone
            errors[row] = error
    sound = [(row, state) for row, state in enumerate(rows) if row not in errors]
    flat = logits.view(-1)
    width = logits.shape[-1]
    _bias(flat, width, [(row, state) for row, state in sound if state.bias[0].size])
    _penalise(flat, width, [(row, state) for row, state in sound if state.tally.ids.size])
    _forbid(flat, width, [(row, state) for row, state in sound if state.waits])
    for row, state in sound:
        try:
            for processor in state.processors:
                logits[row] = _processed(processor(state.tokens, logits[row]), logits[row])
            if state.processors and bool(logits[row].amax() == -torch.inf):
                raise InvalidRequestError(
                    "No token is left to choose: what allowed_token_ids, bad_words, min_tokens and a grammar "
                    "forbid here is every token. Allow more, or let the answer end sooner."
                )
        except Exception as error:  # noqa: BLE001 belongs to this row alone
            errors[row] = error
    return errors


_Rows = Sequence[tuple[int, RowState]]


def _bias(flat: Tensor, width: int, rows: _Rows) -> None:
    if rows:
        places = _places(flat, width, [(row, state.bias[0]) for row, state in rows])
        flat[places] += _on(flat, np.concatenate([state.bias[1] for _, state in rows]))


def _penalise(flat: Tensor, width: int, rows: _Rows) -> None:
    if not rows:
        return
    lengths = [state.tally.ids.size for _, state in rows]
    places = _places(flat, width, [(row, state.tally.ids) for row, state in rows])
    counts = _on(flat, np.concatenate([state.tally.counts for _, state in rows]))

    def spread(values: Sequence[float]) -> Tensor:
        return _on(flat, np.repeat(np.asarray(values, dtype=np.float32), lengths))

    with np.errstate(over="ignore", under="ignore"):
        repetition = spread([state.params.repetition_penalty for _, state in rows])
        frequency = spread([state.params.frequency_penalty for _, state in rows])
        presence = spread([state.params.presence_penalty for _, state in rows])
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[places] = torch.where(counts > 0, values - (counts * frequency + presence), values)


def _forbid(flat: Tensor, width: int, rows: _Rows) -> None:
    if rows:
        flat[_places(flat, width, [(row, state.forbidden) for row, state in rows])] = float("-inf")


def _processed(logits: Tensor, before: Tensor) -> Tensor:
    if logits.shape != before.shape:
        raise ValueError(
            f"a logits processor gave shape {tuple(logits.shape)}, expected {tuple(before.shape)}"
        )
    return logits


def _places(flat: Tensor, width: int, ids: Sequence[tuple[int, NDArray[np.int64]]]) -> Tensor:
    """Places in the flattened matrix of every row's token ids, one after the other."""
    return _on(flat, np.concatenate([row * width + tokens for row, tokens in ids]))


def _on(like: Tensor, values: NDArray[np.int64] | NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(values).to(like.device)
