"""Features by expert, as a fit takes and keeps them: checked, stacked with labels, sampled, counted."""

from collections.abc import Mapping

import torch
from torch import Tensor

from experts.errors import RoutingError


def check_features(training: Mapping[str, Tensor], validation: Mapping[str, Tensor]) -> None:
    """Raise unless both splits cover the same experts with finite features of one width."""
    if not training:
        raise RoutingError("a router needs at least one expert with features")
    if set(training) != set(validation):
        odd = sorted(set(training) ^ set(validation))
        raise RoutingError(
            f"experts {odd} have no features in one of the splits; give prompts for both splits"
        )
    widths = set()
    for split, features_by_name in (("train", training), ("validation", validation)):
        for name, features in features_by_name.items():
            if features.dim() != 2 or features.shape[0] == 0:
                raise RoutingError(f"expert {name!r} has no {split} features; give it {split} prompts")
            if not bool(torch.isfinite(features).all()):
                raise RoutingError(f"expert {name!r} has NaN or Inf in its {split} features")
            widths.add(features.shape[1])
    if len(widths) > 1:
        raise RoutingError(f"features have different widths {sorted(widths)}; use one FeatureSpec for all")


def checked_rows(features: Tensor, width: int) -> Tensor:
    """What a router is asked about, (n, width), as float32 on the CPU.

    Raises:
        RoutingError: another shape.
    """
    if features.dim() != 2 or features.shape[1] != width:
        raise RoutingError(f"features have shape {tuple(features.shape)}; this router reads (n, {width})")
    return features.to(device="cpu", dtype=torch.float32)


def stack(features: Mapping[str, Tensor], names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """(n, d) float32 and (n,) int64 over all experts in the order of `names`."""
    stacked = torch.cat([features[name].to(torch.float32) for name in names])
    labels = torch.cat([torch.full((features[name].shape[0],), i) for i, name in enumerate(names)])
    return stacked, labels


def sample(features: Tensor, limit: int) -> Tensor:
    """At most `limit` rows, chosen at random but always the same, float16."""
    rows = torch.randperm(features.shape[0], generator=torch.Generator().manual_seed(0))[:limit]
    return features[rows.sort().values].clamp(-60000, 60000).to(torch.float16).contiguous()


def confusion(chosen: Tensor, labels: Tensor, classes: int) -> tuple[tuple[int, ...], ...]:
    """(classes, classes) counts, row = label."""
    counts = torch.bincount(labels * classes + chosen, minlength=classes * classes)
    return tuple(tuple(row) for row in counts.view(classes, classes).tolist())
