"""The compiled layer against plain torch: every head count, rank, window and token count, whatever the mix."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.native import build
from service.native.decoder import tiled
from tests.unit.native.plain import MATRICES, NORMS, Expert, Layer, Shape, random_expert, random_layer

SHAPES = {
    "plain": Shape(),
    "one head": Shape(heads=1, groups=1, dim=6, rotary=6, hidden=10, width=7),
    "many queries a key": Shape(heads=34, groups=2, dim=4, rotary=4),
    "wide": Shape(heads=2, groups=1, dim=64, rotary=64, hidden=130, width=150),
    "part rotated": Shape(dim=12, rotary=6),
    "head norms": Shape(norms=("input", "before_mlp", "query", "key")),
    "sandwich": Shape(norms=NORMS, activation=1, window=5),
    "window": Shape(window=16),
    "biases": Shape(biases=True),
}
BLOCK = 16


class Compiled:
    """The compiled object around one layer and a cache of a few blocks."""

    def __init__(self, layer: Layer, experts: list[Expert], dtype: torch.dtype, blocks: int = 40) -> None:
        build.load(build.default_cache())
        shape = layer.shape
        self.dtype = dtype
        self.object = torch.classes.twinserve.Decoder(
            shape.heads, shape.groups, shape.dim, shape.rotary, shape.hidden, shape.width, shape.activation
        )
        self.object.add_rope(layer.cosine, layer.sine)
        scales = [layer.scales.get(name) for name in NORMS]
        self.object.add_layer(scales, layer.epsilon, layer.scale, 0, shape.window, 0)
        joint = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
        weights = [torch.cat([layer.weights[name] for name in names]).to(dtype) for names in joint]
        biases = [
            torch.cat([layer.biases[name] for name in names]).to(dtype) if layer.biases else None
            for names in joint
        ]
        self.object.set_base(0, weights, biases, [None] * len(weights), False)
        cache = torch.full((2, blocks, BLOCK, shape.groups, shape.dim), torch.nan, dtype=dtype)
        self.object.set_cache([cache[0]], [cache[1]])
        for slot, expert in enumerate(experts):
            tensors: list[Tensor | None] = []
            for name in MATRICES:
                a, b = expert.factors.get(name, (None, None))
                tensors += [a, None if b is None else tiled(b), expert.biases.get(name)]
            self.object.set_expert(slot, tensors + [expert.norms.get(name) for name in NORMS])

    def step(self, decode, chunks, segments, mixes) -> list[Tensor]:
        """Sequences of (hidden (tokens, h), position of the first, block table); segments without the last two.

        Returns each one's output.
        """
        parts = [*decode, *chunks, *((hidden, 0, []) for hidden in segments)]
        counts = [hidden.shape[0] for hidden, _, _ in parts]
        positions = [start + i for hidden, start, _ in parts for i in range(hidden.shape[0])]
        places = [
            table[position // BLOCK] * BLOCK + position % BLOCK
            for hidden, start, table in [*decode, *chunks]
            for position in range(start, start + hidden.shape[0])
        ]
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        spans = list(pairwise(bounds))
        middle = spans[len(decode) : len(decode) + len(chunks)]
        self.object.begin(
            _int(positions),
            _int([places]).view(1, -1),
            _tables([table for _, _, table in decode]),
            _int([[*span, start] for span, (_, start, _) in zip(middle, chunks, strict=True)]).view(-1, 3),
            _tables([table for _, _, table in chunks]),
            _int(spans[len(decode) + len(chunks) :]).view(-1, 2),
        )
        uses = [(slot, *span) for span, mix in zip(spans, mixes, strict=True) for slot in mix]
        gates = [gate for mix in mixes for gate in mix.values()]
        self.object.mix(_int(uses).view(-1, 3), torch.tensor(gates, dtype=torch.float32))
        hidden = torch.cat([hidden for hidden, _, _ in parts]).to(self.dtype).contiguous()
        return list(self.object.run(hidden, 0, 1, 0).float().split(counts))


def _int(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _tables(tables: list[list[int]]) -> Tensor:
    width = max((len(table) for table in tables), default=0)
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    return _int(padded).view(1, len(tables), width)


def _hidden(count: int, shape: Shape, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, shape.hidden, generator=generator).to(dtype).float()


def _compare(
    shape: Shape, dtype: torch.dtype, lengths, cuts, ranks, mixes, *, exact: bool, seed: int = 0
) -> None:
    """Sequences run in pieces beside each other, and one as a segment, against each whole on its own."""
    layer = random_layer(shape, seed, dtype=dtype)
    experts = [random_expert(shape, i, rank, dtype, exact=exact) for i, rank in enumerate(ranks)]
    compiled = Compiled(layer, experts, dtype)
    free = list(range(1, 40))
    random.Random(seed).shuffle(free)
    inputs = [_hidden(length, shape, 50 + i, dtype) for i, length in enumerate(lengths)]
    tables = [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
    wanted = [
        layer.run(hidden, experts, [mix] * hidden.shape[0]) for hidden, mix in zip(inputs, mixes, strict=True)
    ]
    slack = [
        _rounding(layer, hidden, experts, mix, whole) if dtype is torch.float32 else 0.0
        for hidden, mix, whole in zip(inputs, mixes, wanted, strict=True)
    ]
    got: list[list[Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        decode, chunks, decoding, chunked = [], [], [], []
        for i, length in enumerate(lengths):
            left = length - done[i]
            if not left:
                continue
            count = min(cuts[i], left) if done[i] < length - 3 else 1
            part = (inputs[i][done[i] : done[i] + count], done[i], tables[i])
            (decode if count == 1 and done[i] else chunks).append(part)
            (decoding if count == 1 and done[i] else chunked).append(i)
            done[i] += count
        order = decoding + chunked
        outputs = compiled.step(decode, chunks, [inputs[0]], [*(mixes[i] for i in order), mixes[0]])
        for i, output in zip(order, outputs, strict=False):
            got[i].append(output)
        _close(outputs[-1], wanted[0], dtype, slack[0])
    for pieces, whole, rounding in zip(got, wanted, slack, strict=True):
        _close(torch.cat(pieces), whole, dtype, rounding)


def _rounding(layer: Layer, hidden: Tensor, experts: Sequence[Expert], mix, wanted: Tensor) -> Tensor:
    """How far float32 alone takes each row from the truth: far where a norm divides by next to nothing."""
    truth = layer.double().run(hidden.double(), experts, [mix] * hidden.shape[0])
    return 4 * (truth - wanted).abs().amax(-1, keepdim=True).float()


def _close(got: Tensor, wanted: Tensor, dtype: torch.dtype, rounding: Tensor | float = 0.0) -> None:
    if dtype is torch.float32:
        apart = (got - wanted).abs() - rounding
        assert bool((apart <= 2e-4 + 2e-4 * wanted.abs()).all()), float(apart.max())
    else:
        assert float((got - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_computes_what_plain_torch_computes(name, dtype):
    _compare(
        SHAPES[name], dtype, lengths=[37, 5, 1, 20], cuts=[9, 5, 1, 16], ranks=[3, 1, 0, 9],
        mixes=[{0: 0.5, 3: -1.25}, {1: 1.0}, {}, {0: 0.25, 1: 0.25, 2: 1.0, 3: 0.5}], exact=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_more_tokens_and_columns_than_a_tile_holds(dtype):
    shape = Shape(heads=3, groups=1, dim=32, rotary=32, hidden=70, width=200)
    _compare(
        shape, dtype, lengths=[150, 70], cuts=[130, 66], ranks=[8, 5, 1],
        mixes=[{0: 1.0, 1: 0.5}, {1: -0.5, 2: 1.0}], exact=False,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [4, 11, 59])
def test_norms_of_next_to_nothing_are_as_right_as_float32_lets_them_be(seed):
    """An MLP of one neuron gives rows that are one direction times a number, which may be tiny."""
    _compare(
        Shape(heads=3, groups=3, dim=4, rotary=4, hidden=62, width=1, norms=NORMS),
        torch.float32, lengths=[50, 9], cuts=[7, 9], ranks=[2], mixes=[{0: 1.0}, {}], exact=False, seed=seed,
    )  # fmt: skip


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_cut_and_mix(data):
    dim = data.draw(st.integers(1, 9)) * 2
    groups = data.draw(st.integers(1, 3))
    shape = Shape(
        heads=groups * data.draw(st.integers(1, 5)),
        groups=groups,
        dim=dim,
        rotary=data.draw(st.integers(1, dim // 2)) * 2,
        hidden=data.draw(st.integers(1, 80)),
        width=data.draw(st.integers(1, 150)),
        window=data.draw(st.sampled_from([0, 1, 4, 20])),
        activation=data.draw(st.integers(0, 1)),
        biases=data.draw(st.booleans()),
        norms=tuple(data.draw(st.sampled_from([SHAPES["plain"].norms, SHAPES["head norms"].norms, NORMS]))),
    )
    ranks = data.draw(st.lists(st.integers(0, 13), min_size=1, max_size=4))
    count = data.draw(st.integers(1, 4))
    mix = st.dictionaries(st.integers(0, len(ranks) - 1), st.sampled_from([1.0, -0.5, 0.25]), max_size=4)
    _compare(
        shape,
        torch.float32,
        lengths=[data.draw(st.integers(1, 50)) for _ in range(count)],
        cuts=[data.draw(st.integers(1, 40)) for _ in range(count)],
        ranks=ranks,
        mixes=[data.draw(mix) for _ in range(count)],
        exact=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )


def test_rows_that_are_not_finite_stay_so_and_spoil_no_other():
    shape = Shape()
    layer = random_layer(shape, 1)
    experts = [random_expert(shape, 0, 3, exact=True)]
    compiled = Compiled(layer, experts, torch.float32)
    good, bad = _hidden(20, shape, 1, torch.float32), _hidden(20, shape, 2, torch.float32)
    # The chunk in front and behind overflow, by their gates or by their input.
    bad[3] = torch.nan
    outputs = compiled.step(
        [], [(good, 0, [1, 2]), (good, 0, [3, 4]), (bad, 0, [5, 6])], [good],
        [{0: float("inf")}, {0: 1.0}, {}, {}],
    )  # fmt: skip
    assert not outputs[0].isfinite().all()
    assert not outputs[2][3:].isfinite().any()
    _close(outputs[1], layer.run(good, experts, [{0: 1.0}] * 20), torch.float32)
    _close(outputs[3], layer.run(good, experts, [{}] * 20), torch.float32)


@pytest.mark.parametrize("value", [1e4, -1e4, 80.0, -80.0, 1e-30])
def test_extreme_activations_saturate_as_torchs_do(value):
    shape = Shape(heads=1, groups=1, dim=2, rotary=2, hidden=4, width=4)
    for activation in (0, 1):
        layer = random_layer(Shape(**{**shape.__dict__, "activation": activation}), 1)
        layer.weights["gate"] = torch.eye(4) * value
        compiled = Compiled(layer, [], torch.float32)
        hidden = _hidden(3, shape, 1, torch.float32)
        (got,) = compiled.step([], [(hidden, 0, [1])], [], [{}])
        wanted = layer.run(hidden, [], [{}] * 3)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_and_not_read():
    shape = Shape()
    compiled = Compiled(random_layer(shape, 1), [], torch.float32)
    hidden = _hidden(3, shape, 1, torch.float32)
    with pytest.raises(ValueError, match="no expert in slot 5"):
        compiled.step([], [(hidden, 0, [1])], [], [{5: 1.0}])
    with pytest.raises(ValueError, match="no base weights 3"):
        compiled.object.run(hidden, 0, 1, 3)
    with pytest.raises(ValueError, match="contiguous"):
        compiled.object.run(hidden.t(), 0, 1, 0)
    with pytest.raises(ValueError, match="no layers 0 to 2"):
        compiled.object.run(hidden, 0, 2, 0)
    with pytest.raises(ValueError, match="must be bfloat16 or float32"):
        compiled.object.run(hidden.to(torch.float16), 0, 1, 0)
    with pytest.raises(ValueError, match="lies beyond the"):
        compiled.step([], [(hidden, 1 << 20, [1] * (1 + (1 << 17)))], [], [{}])
    with pytest.raises(ValueError, match="tensors a layer"):
        compiled.object.set_expert(0, [None] * 5)
    with pytest.raises(ValueError, match="a base has 4 weights"):
        compiled.object.set_base(1, [hidden], [None], [None], False)
