"""Jobs of the registry, from the queue to what is served; and everything that can happen to them on the way."""

import asyncio
import copy
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experts.bundle import Bundle
from experts.registry.sources import new_keys
from experts.registry.work import Limits, Prepared, RegisterTask, Setup, StoreAt, read_profile
from service.errors import LimitExceededError
from service.registrar.checks import Canary, TrialAsked
from service.registrar.work import Supervisor
from service.registrar.work.process import Worker, Workers
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_fine_tune, tiny_lora
from tests.model.registry_bench import (
    ADMIN,
    at_stage,
    bench,
    gone,
    kill_workers,
    workers,
)

PROMPTS = tuple(f"What is the opposite of word{number}?" for number in range(10))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    path = tmp_path_factory.mktemp("family")
    made = tiny_family(path, experts=("alpha", "beta"))
    tiny_lora(path / "root/lora", made.base, 4, seed=31)
    tiny_lora(path / "root/other", made.base, 4, seed=32)
    tiny_fine_tune(path / "root/full", made.base, seed=33)
    (path / "root/empty").mkdir()
    return made


@pytest.fixture
def root(family: TinyFamily) -> Path:
    return family.base.parent / "root"


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    others = set(workers())  # of servers that other tests share
    yield
    assert all(gone(pid) for pid in set(workers()) - others)


def replica(family: TinyFamily, root: Path, tmp_path: Path, **options):
    return bench(family.bundle, root, tmp_path / "state", **options)


def test_a_registration_becomes_a_generation_that_serves(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            first = await here.end_of(here.submit("delta", "lora", prompts=PROMPTS))
            assert first.state == "succeeded", first.failure
            assert (first.progress.percent, first.attempt) == (100, 1)
            assert here.served() == {"alpha": 1, "beta": 1, "delta": 1}
            assert here.staged() == []
            generation = here.catalogue.generation("delta", 1)
            assert generation.state == "ready"
            assert set(generation.files) == {"expert.safetensors", "expert.json"}
            assert set(generation.origin) == {"adapter_config.json", "adapter_model.safetensors"}
            assert generation.report["bytes"] == first.result["report"]["bytes"] > 0
            features, forms = read_profile(here.blobs.path(generation.profile))
            assert (len(features), forms) == (2 * len(PROMPTS), 2)
            assert json.loads(here.blobs.path(generation.prompts).read_text()) == list(PROMPTS)
            router = here.catalogue.snapshot().router
            assert router.profiles == {"alpha": 1, "beta": 1, "delta": 1}
            while not here.ended:  # it is told last of all
                await asyncio.sleep(0.01)
            assert here.half_made() == []
            assert here.ended == [("register", "succeeded")]

    asyncio.run(go())


def test_a_later_generation_without_prompts_keeps_the_routers_profile(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            await here.end_of(here.submit("delta", "lora", prompts=PROMPTS))
            before = here.catalogue.snapshot().router
            second = await here.end_of(here.submit("delta", "full", replace=True))
            assert second.result["router"] == "kept"
            assert here.served()["delta"] == 2
            assert here.catalogue.snapshot().router == before
            assert here.catalogue.generation("delta", 2).origin == {}  # only LoRAs are kept

    asyncio.run(go())


def test_one_process_does_job_after_job(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working() as supervisor:
            await here.end_of(here.submit("delta", "lora"))
            [pid] = workers()
            await here.end_of(here.submit("epsilon", "other"))
            await here.end_of(here.submit("zeta", "empty"))  # a refusal is no reason for another one
            assert workers() == [pid]
            assert os.sched_getscheduler(pid) == os.SCHED_IDLE
            assert os.getpriority(os.PRIO_PROCESS, pid) == 19
            assert supervisor.waiting_process == pid

    asyncio.run(go())


def test_what_cannot_be_an_expert_fails_with_the_reason_and_leaves_nothing(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            before = {blob.sha256 for blob in here.blobs.list()}
            ended = await here.end_of(here.submit("delta", "empty"))
            assert (ended.state, ended.failure.code, ended.failure.param) == (
                "failed",
                "expert_rejected",
                "path",
            )
            assert "has no model.safetensors" in ended.failure.message
            generation = here.catalogue.generation("delta", 1)
            assert generation.state == "failed"
            assert generation.report["error"]["code"] == "expert_rejected"
            assert {blob.sha256 for blob in here.blobs.list()} == before
            assert here.served() == {"alpha": 1, "beta": 1}
            assert here.half_made() == []

    asyncio.run(go())


def test_siblings_that_came_with_an_older_bundle_are_measured_by_their_own_reports(family, root, tmp_path):
    older = tmp_path / "bundle"
    shutil.copytree(family.bundle, older, ignore=shutil.ignore_patterns("registry"))
    manifest = json.loads((older / "manifest.json").read_text())
    norms = [entry["summary"].pop("norm") for entry in manifest["experts"].values()]
    (older / "manifest.json").write_text(json.dumps(manifest))

    async def go() -> None:
        async with bench(older, root, tmp_path / "state") as here, here.working():
            assert here.catalogue.generation("alpha", 1).summary.norm is None
            ended = await here.end_of(here.submit("delta", "lora"))
            assert ended.state == "succeeded", ended.failure
            report = here.catalogue.generation("delta", 1).report
            assert report["siblings_norm"] == pytest.approx(statistics.median(norms))
            assert report["norm_ratio"] == pytest.approx(report["norm"] / report["siblings_norm"])
        async with bench(older, root, tmp_path / "state", max_norm_ratio=1.001) as here, here.working():
            refused = await here.end_of(here.submit("epsilon", "full"))
            assert (refused.state, refused.failure.code) == ("failed", "expert_rejected")
            assert "max_norm_ratio" in refused.failure.message

    asyncio.run(go())


@pytest.mark.parametrize(
    ("match", "least", "state"), [("contains", 1.0, "succeeded"), ("exact", 0.5, "failed")]
)
def test_canary_prompts_decide_before_anybody_gets_the_generation(
    match, least, state, family, root, tmp_path
):
    canaries = (Canary("Add 1 and 2.", "" if match == "contains" else "never this", match),)

    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            ended = await here.end_of(here.submit("delta", "lora", canaries=canaries, canary_min_score=least))
            assert ended.state == state, ended.failure
            generation = here.catalogue.generation("delta", 1)
            [answer] = generation.report["canaries"]["answers"]
            assert answer["passed"] == (state == "succeeded")
            assert answer["answer"]
            assert ("delta" in here.served()) == (state == "succeeded")
            assert here.staged() == []
            if state == "failed":
                assert ended.failure.param == "canary_prompts"
                assert generation.state == "failed"

    asyncio.run(go())


def test_a_generation_can_be_made_ready_without_going_live(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            await here.end_of(here.submit("alpha", "lora", replace=True, activate=False))
            assert here.served()["alpha"] == 1
            assert here.staged() == []
            assert here.catalogue.generation("alpha", 2).state == "ready"
            trial = TrialAsked("canary", 25.0)
            await here.end_of(here.submit("alpha", "other", replace=True, prompts=PROMPTS, trial=trial))
            [tried] = here.catalogue.snapshot().trials
            assert (tried.generation, tried.kind, tried.percent) == (3, "canary", 25.0)
            assert tried.router is not None
            assert here.served()["alpha"] == 1
            assert here.staged() == ["alpha@3"]

    asyncio.run(go())


def test_a_router_that_went_live_meanwhile_is_fitted_upon(family, root, tmp_path, monkeypatch):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            await here.end_of(here.submit("alpha", "lora", prompts=PROMPTS, replace=True))
            assert here.catalogue.snapshot().router.profiles == {"alpha": 2, "beta": 1}

            def roll_back() -> None:
                here.catalogue.activate("alpha", 1, ADMIN, router=1)

            done = at_stage(monkeypatch, "publish", roll_back)
            ended = await here.end_of(here.submit("delta", "other", prompts=PROMPTS))
            assert (done, ended.state, ended.attempt) == (["publish"], "succeeded", 1)
            # Made from router 1, which is the current one again, not from router 2.
            assert here.catalogue.snapshot().router.profiles == {"alpha": 1, "beta": 1, "delta": 1}
            assert here.served() == {"alpha": 1, "beta": 1, "delta": 1}

    asyncio.run(go())


def test_an_older_generation_is_profiled_again_from_what_was_kept(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            await here.end_of(here.submit("delta", "lora", prompts=PROMPTS))
            await here.end_of(here.submit("delta", "other", replace=True, prompts=PROMPTS[:9]))
            here.catalogue.activate("delta", 1, ADMIN)
            job = here.catalogue.submit(
                "reprofile", {"name": "delta", "generation": 1}, ADMIN, name="delta", replace=True, limit=8
            )
            ended = await here.end_of(job)
            assert (ended.state, ended.result["router"]) == ("succeeded", "prompts"), ended.failure
            assert here.catalogue.snapshot().router.profiles["delta"] == 1
            late = here.catalogue.submit(
                "reprofile", {"name": "delta", "generation": 2}, ADMIN, name="delta", replace=True, limit=8
            )
            assert (await here.end_of(late)).result["router"] == "kept"

    asyncio.run(go())


def test_a_rebuilt_bundle_takes_the_served_ones_place(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            await here.end_of(here.submit("delta", "lora", prompts=PROMPTS))
            old = here.catalogue.snapshot().bundle.build_id
            job = here.catalogue.submit("rebuild", {"merge": {"method": "averaging"}}, ADMIN, limit=8)
            ended = await here.end_of(job)
            assert ended.state == "succeeded", ended.failure
            snapshot = here.catalogue.snapshot()
            assert snapshot.bundle.build_id == ended.result["build_id"] != old
            assert here.served() == {"alpha": 2, "beta": 2, "delta": 2}
            assert here.loading.family.build_id == snapshot.bundle.build_id
            assert '"averaging"' in snapshot.bundle.manifest
            assert here.half_made() == []
            # A registration goes on against the new shared expert.
            assert (await here.end_of(here.submit("epsilon", "other"))).state == "succeeded"
            assert here.catalogue.generation("epsilon", 1).build_id == snapshot.bundle.build_id

    asyncio.run(go())


def test_a_bundle_that_nobody_vouches_for_is_not_taken_where_experts_must_be_signed(family, root, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"ann = {new_keys()[1]}\n")

    async def go() -> None:
        async with replica(family, root, tmp_path, signature_keys=keys) as here, here.working():
            ended = await here.end_of(here.catalogue.submit("rebuild", {"path": "full"}, ADMIN, limit=8))
            assert (ended.state, ended.failure.code) == ("failed", "signature_rejected"), ended.failure
            assert here.served() == {"alpha": 1, "beta": 1}

    asyncio.run(go())


def test_jobs_wait_for_a_disk_that_refuses_at_first(family, root, tmp_path, monkeypatch):
    monkeypatch.setattr("service.registrar.work.supervisor._LONGEST_PAUSE_SECONDS", 0.05)

    async def go() -> None:
        async with replica(family, root, tmp_path) as here:
            here.options.folder.parent.mkdir(parents=True, exist_ok=True)
            here.options.folder.write_text("in the way")
            async with here.working():
                job = here.submit("delta", "lora")
                await asyncio.sleep(0.2)
                assert here.catalogue.job(job.id).state == "queued"
                here.options.folder.unlink()
                assert (await here.end_of(job)).state == "succeeded"

    asyncio.run(go())


def test_without_memory_for_two_bundles_nothing_is_rebuilt_and_the_old_one_goes_on(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            old = here.catalogue.snapshot().bundle.build_id
            here.runtime._available = lambda: 1 << 16
            ended = await here.end_of(here.catalogue.submit("rebuild", {}, ADMIN, limit=8))
            assert (ended.state, ended.failure.code) == ("failed", "storage_full")
            assert here.catalogue.snapshot().bundle.build_id == old
            assert (await here.end_of(here.submit("delta", "lora"))).state == "succeeded"

    asyncio.run(go())


def test_a_job_waits_until_its_replica_serves_the_bundle_that_the_catalogue_says(
    family, root, tmp_path, monkeypatch
):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here:
            swapped, go_on = asyncio.Event(), asyncio.Event()
            swap = here.runtime.swap

            async def slow(*arguments, **options) -> None:
                swapped.set()
                await go_on.wait()
                await swap(*arguments, **options)

            monkeypatch.setattr(here.runtime, "swap", slow)

            async def little() -> None:
                await here.follower.reach(here.catalogue.revision(), 0.05)

            monkeypatch.setattr(here, "follow", little)
            async with here.working():
                here.catalogue.submit("rebuild", {}, ADMIN, limit=8)
                await swapped.wait()
                job = here.submit("delta", "lora")
                while here.catalogue.job(job.id).state == "queued":
                    await asyncio.sleep(0.02)
                go_on.set()
                ended = await here.end_of(job)
            assert ended.state == "succeeded", ended.failure
            built = here.catalogue.snapshot().bundle.build_id
            assert here.catalogue.generation("delta", 1).build_id == built == here.loading.family.build_id

    asyncio.run(go())


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        ("features", {"prompts": PROMPTS}),
        ("features", {}),
        ("submit", {"canaries": (Canary("Add 1", "", "contains"),)}),
        ("submit", {"canaries": (Canary("Add 1", "never this", "exact"),)}),
        ("stage", {}),
    ],
    ids=["prompts", "neutral prompts", "canary that passes", "canary that fails", "stage"],
)
def test_what_an_engine_says_around_a_switch_of_the_bundle_is_not_taken(
    asked, more, family, root, tmp_path, monkeypatch
):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working(warm=False):
            ask = getattr(here.runtime, asked)

            def switched(*arguments, **options):
                # To another bundle and back, of which the catalogue says nothing by now.
                here.loading.family = copy.copy(here.loading.family)
                return ask(*arguments, **options)

            monkeypatch.setattr(here.runtime, asked, switched)
            if asked == "features":
                monkeypatch.setattr("service.registrar.work.profile.needs_background", lambda _: True)
            ended = await here.end_of(here.submit("delta", "lora", **more))
            assert (ended.state, ended.failure.code) == ("failed", "wrong_state"), ended.failure
            assert "is not the one that is served any more; try again" in ended.failure.message
            assert "canaries" not in here.catalogue.generation("delta", 1).report
            assert here.served() == {"alpha": 1, "beta": 1}
            assert (here.staged(), list(here.options.folder.glob("neutral-*"))) == ([], [])
            monkeypatch.undo()
            again = await here.end_of(here.submit("delta", "lora", prompts=PROMPTS))
            assert again.state == "succeeded", again.failure

    asyncio.run(go())


def test_a_rebuild_that_makes_no_sense_says_so(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            job = here.catalogue.submit("rebuild", {"merge": {"method": "magic"}}, ADMIN, limit=8)
            ended = await here.end_of(job)
            assert (ended.state, ended.failure.code) == ("failed", "expert_rejected")
            assert "magic" in ended.failure.message
            assert here.served() == {"alpha": 1, "beta": 1}

    asyncio.run(go())


# -- the worker's process dies ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["check", "compress", "route", "store"])
def test_a_job_whose_process_is_killed_is_begun_anew(stage, family, root, tmp_path, monkeypatch):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            done = at_stage(monkeypatch, stage, kill_workers)
            ended = await here.end_of(here.submit("delta", "full", prompts=PROMPTS))
            assert (done, ended.state, ended.attempt) == ([stage], "succeeded", 2), ended.failure
            assert here.served()["delta"] == 1
            assert here.staged() == []
            assert here.half_made() == []

    asyncio.run(go())


@pytest.mark.parametrize("stage", ["try", "publish"])
def test_once_everything_is_stored_the_process_is_not_needed(stage, family, root, tmp_path, monkeypatch):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            done = at_stage(monkeypatch, stage, kill_workers)
            ended = await here.end_of(here.submit("delta", "lora", prompts=PROMPTS))
            assert (done, ended.state, ended.attempt) == ([stage], "succeeded", 1), ended.failure
            assert (await here.end_of(here.submit("epsilon", "other"))).state == "succeeded"

    asyncio.run(go())


def test_a_job_that_kills_every_process_fails_after_so_many_attempts(family, root, tmp_path, monkeypatch):
    async def go() -> None:
        async with replica(family, root, tmp_path, registration_attempts=2) as here, here.working():
            done = at_stage(monkeypatch, "compress", kill_workers, times=9)
            ended = await here.end_of(here.submit("delta", "full"))
            assert (len(done), ended.state, ended.attempt) == (2, "failed", 2)
            assert ended.failure.code == "request_failed"
            assert "died 2 time(s)" in ended.failure.message
            assert "-9" in ended.failure.message
            assert here.catalogue.generation("delta", 1).state == "failed"
            assert here.served() == {"alpha": 1, "beta": 1}
            assert here.half_made() == []
            monkeypatch.undo()
            assert (await here.end_of(here.submit("delta", "lora"))).generation == 2

    asyncio.run(go())


# -- it is cancelled, or takes too long -------------------------------------------------------------


@pytest.mark.parametrize("stage", ["check", "compress", "route", "store", "try", "publish"])
def test_a_job_is_cancelled_wherever_it_is(stage, family, root, tmp_path, monkeypatch):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working() as supervisor:
            job = None

            def cancel() -> None:
                here.catalogue.cancel(job.id, ADMIN)
                supervisor.wake()

            done = at_stage(monkeypatch, stage, cancel)
            job = here.submit("delta", "full", prompts=PROMPTS, canaries=(Canary("Add 1", "", "contains"),))
            ended = await here.end_of(job)
            assert (done, ended.state) == ([stage], "cancelled")
            assert here.catalogue.generation("delta", 1).state == "failed"
            assert here.served() == {"alpha": 1, "beta": 1}
            again = await here.end_of(here.submit("delta", "lora"))
            assert (again.state, again.generation) == ("succeeded", 2)
            assert here.staged() == []
            assert here.half_made() == []

    asyncio.run(go())


def test_a_cancelled_jobs_process_is_killed(family, root, tmp_path, monkeypatch):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working() as supervisor:
            held: list[int] = []
            job = None

            def hang() -> None:
                held.extend(workers())
                os.kill(held[0], signal.SIGSTOP)
                here.catalogue.cancel(job.id, ADMIN)
                supervisor.wake()

            at_stage(monkeypatch, "compress", hang)
            job = here.submit("delta", "full")
            assert (await here.end_of(job)).state == "cancelled"
            assert gone(held[0])
            assert here.half_made() == []

    asyncio.run(go())


def test_a_job_that_takes_too_long_is_stopped(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here:
            async with here.working(seconds=0.5):
                while not workers():
                    await asyncio.sleep(0.01)
                [held] = workers()
                os.kill(held, signal.SIGSTOP)
                ended = await here.end_of(here.submit("delta", "full"))
                assert (ended.state, ended.failure.code) == ("failed", "registration_timeout")
                assert "0.5 s" in ended.failure.message
                assert gone(held)
            async with here.working():
                assert (await here.end_of(here.submit("delta", "lora"))).state == "succeeded"

    asyncio.run(go())


def test_a_process_that_gets_no_more_memory_says_so_and_is_replaced(family, tmp_path):
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_bytes((family.base / "config.json").read_bytes())
    save_file({"w": torch.zeros(2**22)}, large / "model.safetensors")
    store = StoreAt(str(tmp_path / "blobs"), tmp_path / "cache")
    build_id = Bundle.open(family.bundle).manifest.build_id
    task = RegisterTask(family.bundle, build_id, "delta", large, foreign=False, folder=tmp_path)

    async def go() -> None:
        unbound = await Worker.start(Setup(family.bundle, store))
        await unbound.ready()
        status = Path(f"/proc/{unbound.pid}/status").read_text()
        await unbound.kill()
        [used] = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData")]
        setup = Setup(family.bundle, store, Limits(nbytes=used + 2**22))
        pool = Workers(lambda: setup, warm=True)
        async with pool.one() as worker:
            with pytest.raises(LimitExceededError, match="TWINSERVE_REGISTRATION_BYTES"):
                await worker.ask(task, Prepared, lambda step: None)
            assert not worker.usable
        assert pool.pid is None
        assert gone(worker.pid)

    asyncio.run(go())


# -- the supervisor has a fault ----------------------------------------------------------------------


@dataclass
class Faults:
    """What watching over a job raises, one after another, before it goes well; and what was told by then."""

    left: list[Exception] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    monkeypatch.setattr("service.registrar.lasting._FIRST_PAUSE_SECONDS", 0.01)
    watch, made = Supervisor._watch, Faults()

    async def faulty(self: Supervisor, *arguments):
        made.told.append(self.problem)
        if made.left:
            raise made.left.pop()
        return await watch(self, *arguments)

    monkeypatch.setattr(Supervisor, "_watch", faulty)
    return made


def test_a_fault_of_the_supervisor_begins_its_job_anew_and_the_next_ones_go_on(
    faults, family, root, tmp_path, caplog
):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working():
            faults.left.append(RuntimeError("nobody foresaw this"))
            ended = await here.end_of(here.submit("delta", "lora", prompts=PROMPTS))
            assert (ended.state, ended.attempt) == ("succeeded", 2), ended.failure
            assert "nobody foresaw this" in caplog.text
            assert (await here.end_of(here.submit("epsilon", "other"))).attempt == 1
            [first, again, later] = faults.told
            assert (first, later) == ("", "")
            assert "server's log" in again
            assert here.served() == {"alpha": 1, "beta": 1, "delta": 1, "epsilon": 1}
            assert here.staged() == []

    asyncio.run(go())


def test_a_job_that_is_a_fault_to_the_supervisor_every_time_fails_and_no_other_does(
    faults, family, root, tmp_path
):
    async def go() -> None:
        async with replica(family, root, tmp_path, registration_attempts=2) as here:
            faults.left.extend([RuntimeError("again"), RuntimeError("nobody foresaw this")])
            async with here.working():
                job, other = here.submit("delta", "lora"), here.submit("epsilon", "other")
                ended = await here.end_of(job)
                assert (ended.state, ended.attempt, ended.failure.code) == ("failed", 2, "request_failed")
                assert here.catalogue.generation("delta", 1).state == "failed"
                assert (await here.end_of(other)).state == "succeeded"
                assert here.served() == {"alpha": 1, "beta": 1, "epsilon": 1}

    asyncio.run(go())


# -- the supervisor dies, or comes back from the dead -----------------------------------------------


@pytest.mark.parametrize("stage", ["compress", "store", "try"])
def test_another_replica_takes_up_a_dead_ones_job(stage, family, root, tmp_path, monkeypatch):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here:
            died = asyncio.Event()
            done = at_stage(monkeypatch, stage, died.set)
            async with here.working("first"):
                job = here.submit("delta", "full", prompts=PROMPTS)
                await died.wait()
            assert (done, here.catalogue.job(job.id).state) == ([stage], "running")
            assert here.staged() == []
            assert workers() == []
            async with here.working("second"):
                here.catalogue.requeue("first", 3)
                ended = await here.end_of(job)
            assert (ended.state, ended.owner, ended.attempt) == ("succeeded", "second", 2)
            assert here.served()["delta"] == 1

    asyncio.run(go())


def test_who_publishes_too_late_changes_nothing(family, root, tmp_path, monkeypatch):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here, here.working("zombie"):

            def lose() -> None:
                here.catalogue.requeue("zombie", 3)
                assert here.catalogue.claim("other").attempt == 2

            done = at_stage(monkeypatch, "publish", lose)
            job = here.submit("delta", "lora", prompts=PROMPTS)
            while not done or here.half_made():
                await asyncio.sleep(0.02)
            now = here.catalogue.job(job.id)
            assert (now.state, now.owner, now.attempt) == ("running", "other", 2)
            assert here.catalogue.generation("delta", 1).state == "registering"
            assert here.served() == {"alpha": 1, "beta": 1}
            assert here.staged() == []
            assert here.ended == []

    asyncio.run(go())


def test_what_a_killed_server_left_is_swept_by_the_next_start(family, root, tmp_path):
    async def go() -> None:
        async with replica(family, root, tmp_path) as here:
            left = here.options.folder / "work-of-the-dead"
            left.mkdir(parents=True)
            (left / "half.safetensors").write_bytes(b"x" * 100)
            async with here.working():
                await here.end_of(here.submit("delta", "lora"))
                assert not left.exists()

    asyncio.run(go())


_PARENT = """
import asyncio, sys
from pathlib import Path
from experts.registry.work import Setup, StoreAt
from service.registrar.work.process import Worker

async def main():
    worker = await Worker.start(Setup(Path(sys.argv[1]), StoreAt(sys.argv[2], Path(sys.argv[2]))))
    if sys.argv[3] == "ready":
        await worker.ready()
    print(worker.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["starting", "ready"])
def test_the_process_dies_with_its_server_however_that_dies(when, family, tmp_path):
    command = [sys.executable, "-c", _PARENT, str(family.bundle), str(tmp_path), when]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        pid = int(server.stdout.readline())
        server.kill()
    assert gone(pid)
