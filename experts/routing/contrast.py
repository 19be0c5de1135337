"""Whose weights answer a prompt more than the other experts' do, reading by reading: the default data-free score.

Four steps make it sharper than `energies`, all of them of neutral prompts and weights alone:

1. A mean state is mostly the chat template and the words that every prompt has. What is left after the neutral
   mean is whitened by the neutral covariance, and an expert's answer is the energy within the span of its rows, as
   in a matched subspace detector (Scharf and Friedlander 1994). The last state is read as it is: the answer
   starts there, and what all prompts have in common there is part of it.
2. Adapters of one recipe start from the same random factors and end near them: most of a span tells of the seed
   alone. Every state is read a second time, centred and whitened, by what experts' spans do not have in common.
3. A prompt that moves every expert tells nothing, so a reading counts against the mean over the experts.
4. Early layers know the words and late ones the task: readings vote, each with one voice shared among the
   experts and nobody, instead of being added up, so that a loud one cannot outvote the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from experts.routing.features import FeatureSpec

RIDGE = 1.0
"""Added to the neutral covariance, in units of its mean variance: there are fewer neutral prompts than dimensions."""
TEMPERATURE = 0.125
"""Divides the logarithms of shares of votes; the share of right answers is about the probability then."""
_LEAST = 1e-9
_SPANNED = 1e-6
"""Share of the largest squared length below which a direction is rounding, not part of a span."""
_CLIP = 8.0


@dataclass(frozen=True, slots=True)
class Look:
    """Experts' rows for one kind of state.

    Attributes:
        part: which of a tap's states.
        centred: the neutral mean is taken off the state; without it the state is read at unit length.
        rows: (taps, experts × groups × rank, hidden) float32.
        present: (experts, taps × groups) bool: the expert has rows there.
    """

    part: int
    centred: bool
    rows: Tensor
    present: Tensor


@dataclass(frozen=True, slots=True)
class Contrast:
    """Experts' rows, made ready for features of one spec.

    Attributes:
        origin: (forms, taps, states, hidden) float32, mean of the neutral prompts' states.
        looks: one after another, what readings are of.
        groups: matrices' groups of a tap.
    """

    origin: Tensor
    looks: tuple[Look, ...]
    groups: int

    @classmethod
    def of(cls, rows: Tensor, background: Tensor, forms: int, spec: FeatureSpec) -> "Contrast":
        """Of (experts, taps, groups, rank, hidden) rows and (n, d) features, `forms` consecutive ones a prompt."""
        _, taps, groups, _, hidden = rows.shape
        units = functional.normalize(rows, dim=-1, eps=_LEAST) * (rows.square().sum(-1, keepdim=True) > 0)
        own = peculiar(units)
        states = background.view(-1, forms, taps, background.shape[1] // (taps * hidden), hidden)
        origin = states.mean(0)
        centred = (states - origin).flatten(0, 1)

        def white(part: int, each: Tensor) -> Look:
            made = [whitened(each[:, tap], centred[:, tap, part]) for tap in range(taps)]
            return Look(part, True, torch.stack(made), _present(each))

        looks = []
        if spec.pooling != "last":
            looks += [white(0, units), white(0, own)]
        if spec.pooling != "mean":
            last = states.shape[3] - 1
            raw = units.transpose(0, 1).flatten(1, 3).contiguous()
            looks += [Look(last, False, raw, _present(units)), white(last, own)]
        return cls(origin, tuple(looks), groups)

    def readings(self, features: Tensor, form: Tensor) -> Tensor:
        """(n, d) features, each of the form (n,) → (n, experts, readings): log energies against their mean.

        Look by look, and within one tap by tap and group by group.
        """
        _, taps, parts, hidden = self.origin.shape
        states = features.view(features.shape[0], taps, parts, hidden)
        found = []
        for look in self.looks:
            state = states[:, :, look.part]
            if look.centred:
                state = state - self.origin[form][:, :, look.part]
            else:
                state = functional.normalize(state, dim=-1, eps=_LEAST)
            found.append(self._energies(state, look))
        return torch.cat(found, dim=2)

    def _energies(self, states: Tensor, look: Look) -> Tensor:
        """(n, taps, hidden) states → (n, experts, taps × groups)."""
        experts, taps = look.present.shape[0], look.rows.shape[0]
        answers = torch.bmm(states.transpose(0, 1), look.rows.transpose(1, 2))
        rank = look.rows.shape[1] // (experts * self.groups)
        energy = answers.view(taps, states.shape[0], experts, self.groups, rank).square().sum(-1)
        energy = energy.permute(1, 2, 0, 3).flatten(2).clamp(min=_LEAST).log()
        count = look.present.sum(0)
        mean = (energy * look.present).sum(1, keepdim=True) / count.clamp(min=1)
        # An expert that is alone in a reading has nobody to be compared with.
        return torch.where(look.present, energy - mean * (count > 1), 0.0)


def peculiar(units: Tensor) -> Tensor:
    """(experts, taps, groups, rank, hidden) orthonormal rows, or zeros, without what the spans have in common.

    A direction is common where more energy of all rows lies along it than along any direction of so many random
    ones (the edge of Marchenko and Pastur 1967). One expert alone, or spans of unlike starts, have none.
    """
    experts, taps, groups, rank, hidden = units.shape
    every = units.permute(1, 2, 0, 3, 4).reshape(taps * groups, experts * rank, hidden)
    found = torch.stack([_peculiar(each) for each in every])
    return found.view(taps, groups, experts, rank, hidden).permute(2, 0, 1, 3, 4).contiguous()


def _peculiar(rows: Tensor) -> Tensor:
    """(n, hidden): `peculiar` at one tap for one group."""
    kept = rows[rows.square().sum(1) > 0]
    edge = (1 + (kept.shape[0] / rows.shape[1]) ** 0.5) ** 2
    wide = kept.shape[0] < rows.shape[1]
    values, vectors = torch.linalg.eigh(kept @ kept.T if wide else kept.T @ kept)
    vectors = vectors[:, values > edge]
    if not vectors.shape[1]:
        return rows
    common = functional.normalize(kept.T @ vectors, dim=0) if wide else vectors
    left = rows - (rows @ common) @ common.T
    return torch.where(left.square().sum(1, keepdim=True) > _SPANNED, left, 0.0)


def _present(units: Tensor) -> Tensor:
    """(experts, taps × groups) bool."""
    return (units.square().sum((3, 4)) > 0).flatten(1)


def whitened(rows: Tensor, centred: Tensor) -> Tensor:
    """(experts × groups × rank, hidden) rows W: ‖W·x‖² is the energy of C^-½·x within the span of C^-½·rowsᵀ.

    Args:
        rows: (experts, groups, rank, hidden); rows of zeros give rows of zeros.
        centred: (n, hidden) neutral states without their mean, whose covariance with a ridge is C.
    """
    hidden = rows.shape[-1]
    covariance = centred.T @ centred / centred.shape[0]
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=_LEAST)
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(hidden))
    filters = torch.cholesky_solve(rows.reshape(-1, hidden).T, factor).T.view(rows.shape)
    values, vectors = torch.linalg.eigh((rows @ filters.transpose(-1, -2)).to(torch.float64))
    kept = values > _SPANNED * values.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(kept, values.clamp(min=torch.finfo(torch.float32).tiny).rsqrt(), 0.0)
    turned: Tensor = (scales[..., None] * vectors.transpose(-1, -2)).to(torch.float32)
    return (turned @ filters).flatten(0, 2)


def voted(found: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(n, experts, readings) → (n, experts): logarithm of an expert's mean share of the readings' votes.

    Args:
        mean, std: (n, experts, readings) of the same readings on neutral prompts of each prompt's form. Where
            these do not vary an expert has no rows, and stands as nobody does.
    """
    z = torch.where(std > 1e-4, (found - mean) / std.clamp(min=1e-3), 0.0).clamp(-_CLIP, _CLIP)
    nobody = torch.zeros_like(z[:, :1])
    shares: Tensor = torch.softmax(torch.cat([z, nobody], dim=1), dim=1)[:, :-1].mean(2)
    return shares.log()
