"""Whose weights answer a prompt more than the other experts' do, reading by reading: the default data-free score.

Three steps make it sharper than `energies`, all of them of neutral prompts and weights alone:

1. A mean state is mostly the chat template and the words that every prompt has. What is left after the neutral
   mean is whitened by the neutral covariance, and an expert's answer is the energy within the span of its rows, as
   in a matched subspace detector (Scharf and Friedlander 1994). The last state is read as it is: the answer
   starts there, and what all prompts have in common there is part of it.
2. A prompt that moves every expert tells nothing, so a reading counts against the mean over the experts.
3. Early layers know the words and late ones the task: readings vote, each with one voice shared among the
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
_CLIP = 8.0


@dataclass(frozen=True, slots=True)
class Contrast:
    """Experts' rows, made ready for features of one spec.

    Attributes:
        origin: (forms, taps, hidden) float32, mean of the neutral prompts' mean states.
        means: (taps, experts × groups × rank, hidden) float32 for centred mean states; None where none are read.
        lasts: the same for last states.
        present: (experts, taps × groups) bool: the expert has rows there.
        groups: matrices' groups of a tap.
    """

    origin: Tensor
    means: Tensor | None
    lasts: Tensor | None
    present: Tensor
    groups: int

    @classmethod
    def of(cls, rows: Tensor, background: Tensor, forms: int, spec: FeatureSpec) -> "Contrast":
        """Of (experts, taps, groups, rank, hidden) rows and (n, d) features, `forms` consecutive ones a prompt."""
        _, taps, groups, _, hidden = rows.shape
        units = functional.normalize(rows, dim=-1, eps=_LEAST)
        present = rows.square().sum((3, 4)) > 0
        states = background.view(-1, forms, taps, background.shape[1] // (taps * hidden), hidden)
        origin = states[:, :, :, 0].mean(0)
        means = None
        if spec.pooling != "last":
            centred = (states[:, :, :, 0] - origin).flatten(0, 1).transpose(0, 1)
            means = torch.stack([whitened(units[:, tap], centred[tap]) for tap in range(taps)])
        lasts = None if spec.pooling == "mean" else units.transpose(0, 1).flatten(1, 3).contiguous()
        return cls(origin, means, lasts, present.flatten(1), groups)

    def readings(self, features: Tensor, form: Tensor) -> Tensor:
        """(n, d) features, each of the form (n,) → (n, experts, readings): log energies against their mean.

        Means come before last states, each tap by tap and group by group.
        """
        _, taps, hidden = self.origin.shape
        states = features.view(features.shape[0], taps, features.shape[1] // (taps * hidden), hidden)
        found = []
        if self.means is not None:
            found.append(self._energies(states[:, :, 0] - self.origin[form], self.means))
        if self.lasts is not None:
            last = functional.normalize(states[:, :, -1], dim=-1, eps=_LEAST)
            found.append(self._energies(last, self.lasts))
        return torch.cat(found, dim=2)

    def _energies(self, states: Tensor, rows: Tensor) -> Tensor:
        """(n, taps, hidden) states → (n, experts, taps × groups)."""
        experts, taps = self.present.shape[0], rows.shape[0]
        answers = torch.bmm(states.transpose(0, 1), rows.transpose(1, 2))
        rank = rows.shape[1] // (experts * self.groups)
        energy = answers.view(taps, states.shape[0], experts, self.groups, rank).square().sum(-1)
        energy = energy.permute(1, 2, 0, 3).flatten(2).clamp(min=_LEAST).log()
        count = self.present.sum(0)
        mean = (energy * self.present).sum(1, keepdim=True) / count.clamp(min=1)
        # An expert that is alone in a reading has nobody to be compared with.
        return torch.where(self.present, energy - mean * (count > 1), 0.0)


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
    kept = values > _LEAST * values.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
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
