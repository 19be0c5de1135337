"""Promises of a classifier bundle: complete, exact where it must be, refused when broken, written whole or not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.bundle import Bundle
from experts.bundle_manifest import MANIFEST_NAME
from experts.classification.build import ClassifierPlan, build_classifier
from experts.classification.bundle import ClassifierBundle
from experts.classification.checkpoints import ClassifierFineTune
from experts.classification.features import encoder_features
from experts.compression import CompressionSpec
from experts.errors import (
    BundleError,
    CheckpointError,
    CorruptBundleError,
    MismatchError,
    RoutingError,
    UnknownExpertError,
)
from experts.routing import FeatureSpec, MlpRouter
from tests.fixtures.classifiers import (
    LABELS,
    TinyClassifiers,
    tiny_classifier,
    tiny_classifiers,
    tiny_encoder,
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyClassifiers:
    return tiny_classifiers(tmp_path_factory.mktemp("family"))


@pytest.fixture
def copy(family: TinyClassifiers, tmp_path: Path) -> Path:
    return Path(shutil.copytree(family.bundle, tmp_path / "copy"))


def plan(family: TinyClassifiers, out: Path, **changes: object) -> ClassifierPlan:
    return ClassifierPlan(base=family.base, experts=family.experts, out=out, **changes)  # type: ignore[arg-type]


def test_labels_heads_and_router_are_all_there(family: TinyClassifiers) -> None:
    bundle = ClassifierBundle.open(family.bundle)
    assert bundle.expert_names() == tuple(sorted(LABELS))
    assert {name: bundle.entry(name).labels for name in LABELS} == LABELS
    router = bundle.router()
    assert isinstance(router, MlpRouter)
    assert (router.names, router.generation) == (tuple(sorted(LABELS)), 1)
    with pytest.raises(UnknownExpertError, match="nobody"):
        bundle.head("nobody")


def test_heads_biases_and_norms_are_exact(family: TinyClassifiers) -> None:
    bundle = ClassifierBundle.open(family.bundle)
    for name, folder in family.experts.items():
        fine_tune = ClassifierFineTune(name, folder, bundle.shared)
        weights = bundle.expert(name)
        for key, tensor in fine_tune.head.items():
            assert torch.equal(bundle.head(name)[key], tensor)
        for key, delta in weights.exact.items():
            torch.testing.assert_close(bundle.shared.tensor(key) + delta, fine_tune.tensor(key))
        touched = set(weights.exact) | set(weights.factors)
        assert touched == fine_tune.touched()


def test_the_manifest_counts_what_is_stored(family: TinyClassifiers) -> None:
    bundle = ClassifierBundle.open(family.bundle)
    for name in bundle.expert_names():
        entry, weights = bundle.entry(name), bundle.expert(name)
        assert entry.summary.nbytes == weights.nbytes
        assert entry.head_nbytes == sum(tensor.nbytes for tensor in bundle.head(name).values())
        assert entry.nbytes == entry.summary.nbytes + entry.head_nbytes


@pytest.mark.parametrize(
    "path", ["experts/tone/head.safetensors", "experts/size/expert.safetensors", "router/router.json",
             "shared/model.safetensors", "shared/config.json"],
)  # fmt: skip
def test_a_changed_or_missing_file_is_named(copy: Path, path: str) -> None:
    content = (copy / path).read_bytes()
    (copy / path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptBundleError, match=path.rsplit("/", 1)[-1]):
        ClassifierBundle.open(copy)
    (copy / path).unlink()
    with pytest.raises(CorruptBundleError, match="missing"):
        ClassifierBundle.open(copy)


def test_a_head_of_another_shape_is_refused_without_digests(copy: Path) -> None:
    path = copy / "experts/tone/head.safetensors"
    save_file({name: torch.cat([part, part]) for name, part in load_file(path).items()}, path)
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    manifest["files"]["experts/tone/head.safetensors"]["nbytes"] = path.stat().st_size
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(CorruptBundleError, match=r"classifier\.weight"):
        ClassifierBundle.open(copy, verify=False)


def test_a_strange_file_in_shared_and_a_link_are_refused(copy: Path) -> None:
    (copy / "shared" / "extra.py").write_text("")
    with pytest.raises(CorruptBundleError, match=r"extra\.py"):
        ClassifierBundle.open(copy)
    (copy / "shared" / "extra.py").unlink()
    (copy / "router" / "link").symlink_to(copy / MANIFEST_NAME)
    with pytest.raises(CorruptBundleError, match="symbolic link"):
        ClassifierBundle.open(copy)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("format_version", 2, BundleError, "rebuild"),
        ("format", "other", BundleError, "language model"),
        ("experts", {}, CorruptBundleError, "experts"),
        ("files", {}, CorruptBundleError, "not listed"),
        ("surplus", 1, CorruptBundleError, "surplus"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(copy, field, value, error, message) -> None:
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest | {field: value}))
    with pytest.raises(error, match=message):
        ClassifierBundle.open(copy)


def test_neither_kind_of_bundle_opens_as_the_other(family: TinyClassifiers, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Bundle.open(family.bundle)
    with pytest.raises(BundleError, match="twinserve classifier build"):
        ClassifierBundle.open(tmp_path)


def test_a_failed_build_leaves_nothing_behind(family: TinyClassifiers, tmp_path: Path) -> None:
    out = tmp_path / "place" / "bundle"
    with pytest.raises(CheckpointError):
        build_classifier(plan(family, out, method=Exploding()))
    assert list(out.parent.iterdir()) == []


class Exploding:
    """A merge method that nobody knows."""

    @property
    def method(self) -> str:
        raise CheckpointError("a fault in the middle")


def test_a_bundle_is_replaced_only_when_asked(copy: Path, family: TinyClassifiers) -> None:
    with pytest.raises(BundleError, match="overwrite"):
        build_classifier(plan(family, copy))
    before = ClassifierBundle.open(copy).manifest.build_id
    assert build_classifier(plan(family, copy, overwrite=True)).manifest.build_id != before
    assert {path.name for path in copy.parent.iterdir()} == {"copy"}


def test_what_a_plan_lacks_is_told_before_any_work(family: TinyClassifiers, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(BundleError, match="no experts"):
        build_classifier(ClassifierPlan(base=family.base, experts={}, out=out))
    with pytest.raises(BundleError, match="own name"):
        build_classifier(plan(family, out, name="tone"))
    with pytest.raises(RoutingError, match="colour"):
        build_classifier(plan(family, out, texts={"tone": (), "size": ()}))
    with pytest.raises(BundleError, match="extras"):
        build_classifier(plan(family, out, compression=CompressionSpec(rank=2)))


def test_a_classifier_of_another_encoder_is_refused(family: TinyClassifiers, tmp_path: Path) -> None:
    bundle = ClassifierBundle.open(family.bundle)
    other = tiny_classifier(tmp_path / "other", tiny_encoder("roberta", tmp_path / "roberta"), ("a", "b"), 1)
    with pytest.raises(MismatchError, match="roberta"):
        ClassifierFineTune("other", other, bundle.shared)
    with pytest.raises(CheckpointError, match="not a sequence classifier"):
        ClassifierFineTune("base", family.base, bundle.shared)


@pytest.mark.parametrize("table", [None, {"0": "a"}, {"0": "a", "2": "b"}, {"0": "a", "1": "a"}])
def test_a_label_set_that_is_none_is_refused(family: TinyClassifiers, tmp_path: Path, table) -> None:
    bundle = ClassifierBundle.open(family.bundle)
    folder = Path(shutil.copytree(family.experts["tone"], tmp_path / "tone"))
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = table
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="id2label"):
        ClassifierFineTune("tone", folder, bundle.shared)


def test_features_do_not_depend_on_the_company(family: TinyClassifiers) -> None:
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(family.base).eval()
    texts = [[2, 7, 3], [2, 8, 9, 10, 11, 3], [2, 12, 3], [2, *range(5, 25), 3]]
    spec = FeatureSpec(layer=-1, taps=(1,), pooling="mean_last")
    together = encoder_features(encoder, texts, 0, spec)
    assert together.shape == (4, spec.size(32))
    for row, ids in enumerate(texts):
        alone = encoder_features(encoder, [ids], 0, spec)[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(RoutingError, match="encoder has 2"):
        encoder_features(encoder, texts, 0, FeatureSpec(layer=9))
    with pytest.raises(RoutingError, match="without tokens"):
        encoder_features(encoder, [[]], 0, spec)
