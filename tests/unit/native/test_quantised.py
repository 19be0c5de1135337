"""int8 base weights: the compiled layer computes what the dequantised weights would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.native.parts import UnrecognisedError
from service.native.quantise import dequantised, panels, quantise
from tests.unit.native.plain import MATRICES, NORMS, Shape, random_expert, random_layer
from tests.unit.native.test_kernels import Compiled

JOINT = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
WHOLE_TILES = Shape(heads=2, groups=1, dim=32, rotary=32, hidden=64, width=96)
SHAPES = {
    "whole tiles": WHOLE_TILES,
    "no whole tile": Shape(heads=1, groups=1, dim=6, rotary=6, hidden=11, width=7),
    "part of a tile": Shape(heads=2, groups=1, dim=20, rotary=20, hidden=33, width=50),
    "biases and windows": Shape(biases=True, window=5, norms=NORMS),
}


def _compiled(shape: Shape, dtype: torch.dtype) -> tuple[Compiled, Compiled]:
    """A layer on int8 weights, and the same on what they stand for."""
    layer = random_layer(shape, 3, dtype=dtype)
    experts = [random_expert(shape, 0, 3, dtype, exact=True)]
    whole = [torch.cat([layer.weights[name] for name in names]) for names in JOINT]
    biases = [
        torch.cat([layer.biases[name] for name in names]).float() if layer.biases else None for names in JOINT
    ]
    int8 = Compiled(layer, experts, dtype)
    parts = [quantise(weight) for weight in whole]
    int8.object.set_base(
        0, [panels(steps) for steps, _ in parts], biases, [scale for _, scale in parts], False
    )
    layer.weights = {name: dequantised(layer.weights[name]) for name in MATRICES}
    return int8, Compiled(layer, experts, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 33, 50, 70])
def test_a_layer_on_int8_weights_computes_what_the_dequantised_ones_do(name, dtype, tokens):
    shape = SHAPES[name]
    int8, plain = _compiled(shape, dtype)
    hidden = torch.randn(tokens, shape.hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    step = ([], [(hidden.float(), 0, [1, 2, 3, 4, 5])], [], [{0: 0.5}])
    (got,), (wanted,) = int8.step(*step), plain.step(*step)
    assert float((got - wanted).norm() / wanted.norm()) < (1e-5 if dtype is torch.float32 else 0.02)


@settings(max_examples=60)
@given(
    out=st.integers(1, 40),
    inside=st.integers(1, 70),
    seed=st.integers(0, 9),
    strength=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
)
def test_quantisation_is_off_by_half_a_step_at_most(out, inside, seed, strength):
    weight = torch.randn(out, inside, generator=torch.Generator().manual_seed(seed)) * strength
    weight[0] = 0
    steps, scales = quantise(weight)
    assert steps.dtype == torch.int8
    assert scales[0] == 0
    assert ((dequantised(weight) - weight).abs() <= scales[:, None] * 0.5001).all()
    assert panels(steps).sum() == steps.sum()
    assert panels(steps).shape == (-(-out // 16), -(-inside // 32) * 16, 16, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_cannot_become_int8(value):
    with pytest.raises(UnrecognisedError, match="NaN or Inf"):
        quantise(torch.tensor([[1.0, value]]))


def test_rows_of_input_that_are_not_finite_spoil_no_other():
    int8, _ = _compiled(WHOLE_TILES, torch.bfloat16)
    good = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    bad = torch.full((3, 64), torch.nan)
    first, spoilt, last = int8.step([], [(good, 0, [1]), (bad, 0, [2]), (good, 0, [3])], [], [{}, {}, {}])
    assert first.isfinite().all()
    assert not spoilt.isfinite().any()
    assert torch.equal(first, last)


def test_panels_that_do_not_fit_are_refused_and_not_read():
    int8, _ = _compiled(WHOLE_TILES, torch.float32)
    good = [panels(torch.zeros(sum(WHOLE_TILES.sizes(n)[0] for n in names), WHOLE_TILES.sizes(names[0])[1],
            dtype=torch.int8)) for names in JOINT]  # fmt: skip
    scales = [torch.zeros(sum(WHOLE_TILES.sizes(n)[0] for n in names)) for names in JOINT]
    int8.object.set_base(1, good, [None] * 4, scales, False)
    with pytest.raises(ValueError, match="panels must be int8"):
        int8.object.set_base(1, [good[0][:-1], *good[1:]], [None] * 4, scales, False)
    with pytest.raises(ValueError, match="scales"):
        int8.object.set_base(1, good, [None] * 4, [scales[0][:-1], *scales[1:]], False)
    with pytest.raises(ValueError, match="bias must be float32"):
        int8.object.set_base(1, good, [scales[0].bfloat16(), None, None, None], scales, False)
