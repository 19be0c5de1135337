"""Experts read one generation at a time: nothing is read before it is wanted, and nothing unchecked is used."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.bundle import Bundle
from experts.errors import CorruptBundleError, UnknownExpertError
from experts.registry import describe_source, prepare_expert
from tests.fixtures.bundles import with_expert
from tests.fixtures.tiny import tiny_lora
from tests.unit.bundle.test_reading import EXPERT, resign


@pytest.fixture(scope="session")
def newcomer(family, tmp_path_factory):
    """A LoRA of the family's base that is not in the bundle."""
    return tiny_lora(tmp_path_factory.mktemp("newcomer") / "lora", family.base, rank=3, seed=77)


def _flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _same(first, second):
    return all(torch.equal(factors.U, second.factors[name].U) for name, factors in first.factors.items())


def test_a_loaded_expert_is_the_one_that_the_bundle_reads(bundle):
    loaded = bundle.loader().load("beta", 1)
    assert (loaded.name, loaded.generation) == ("beta", 1)
    assert _same(loaded, bundle.expert("beta"))


def test_a_replaced_generation_can_still_be_loaded(bundle, newcomer):
    before = bundle.expert("alpha")
    compressed = prepare_expert(bundle, "alpha", newcomer)
    loader = with_expert(bundle, "alpha", compressed, describe_source(newcomer)).loader()
    assert _same(loader.load("alpha", 1), before)
    assert not _same(loader.load("alpha", 2), before)


def test_a_generation_that_the_bundle_does_not_have_is_unknown(bundle):
    loader = bundle.loader()
    with pytest.raises(UnknownExpertError, match="no experts/delta/1"):
        loader.load("delta", 1)
    with pytest.raises(UnknownExpertError, match="no experts/alpha/2"):
        loader.load("alpha", 2)


def test_a_lazily_opened_bundle_reads_no_expert_before_it_is_loaded(path):
    _flip_a_byte(path / EXPERT)
    with pytest.raises(CorruptBundleError, match=EXPERT):
        Bundle.open(path)
    bundle = Bundle.open(path, lazy=True)
    assert bundle.loader().load("alpha", 1).generation == 1
    with pytest.raises(CorruptBundleError, match=EXPERT):
        bundle.loader().load("beta", 1)


@pytest.mark.parametrize("name", ["shared/model.safetensors", "router/1/router.safetensors"])
def test_a_lazily_opened_bundle_is_hashed_but_for_its_experts(path, name):
    _flip_a_byte(path / name)
    with pytest.raises(CorruptBundleError, match=name):
        Bundle.open(path, lazy=True)


def test_a_missing_or_truncated_expert_is_found_at_once_even_lazily(path):
    os.truncate(path / EXPERT, (path / EXPERT).stat().st_size - 1)
    with pytest.raises(CorruptBundleError, match=f"{EXPERT} has"):
        Bundle.open(path, lazy=True)
    (path / EXPERT).unlink()
    with pytest.raises(CorruptBundleError, match=f"{EXPERT} is missing"):
        Bundle.open(path, lazy=True)


def test_an_expert_that_does_not_fit_is_refused_with_and_without_digests(path):
    tensors = load_file(path / EXPERT)
    name = next(name for name in tensors if name.endswith(".S"))
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, path / EXPERT)
    resign(path, EXPERT)
    bundle = Bundle.open(path, lazy=True)
    for verify in (True, False):
        with pytest.raises(CorruptBundleError, match="do not multiply"):
            bundle.loader(verify=verify).load("beta", 1)


def test_an_expert_that_became_a_link_or_went_away_is_refused(bundle, tmp_path):
    (bundle.path / EXPERT).rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptBundleError, match="is missing"):
        bundle.loader().load("beta", 1)
    (bundle.path / EXPERT).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptBundleError, match="symbolic link"):
        bundle.loader().load("beta", 1)


def test_a_failed_check_is_made_again_the_next_time(bundle, tmp_path):
    loader = bundle.loader()
    (bundle.path / EXPERT).rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptBundleError):
        loader.load("beta", 1)
    (tmp_path / "elsewhere").rename(bundle.path / EXPERT)
    assert loader.load("beta", 1).generation == 1
