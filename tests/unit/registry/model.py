"""What a catalogue shall do, in plain Python: dictionaries, and one method for each change.

Every method raises the error that the catalogue shall raise, before it changes anything.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from experts.errors import (
    DuplicateExpertError,
    GenerationConflictError,
    JobLostError,
    RecordNotFoundError,
    RegistryFullError,
    StaleRouterError,
    TransitionError,
    UnknownExpertError,
)
from experts.registry.records import Trial

OPEN = ("queued", "running")
LIMIT = 4


@dataclass
class ModelExpert:
    state: str = "active"
    live: int | None = None
    last: int = 0
    pinned: bool = False
    trial: Trial | None = None
    generations: dict[int, str] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        ready = any(state in ("ready", "collected") for state in self.generations.values())
        return self.live is not None or self.trial is not None or ready

    @property
    def used(self) -> bool:
        return self.state != "retired" and self.live is not None


@dataclass
class ModelJob:
    id: str
    name: str
    number: int
    replace: bool
    expected: int | None
    state: str = "queued"
    attempt: int = 0
    deaths: int = 0
    owner: str | None = None
    cancelling: bool = False


class Model:
    def __init__(self) -> None:
        self.revision = 1
        self.experts = {
            "a": ModelExpert(live=3, last=3, generations={3: "ready"}),
            "b": ModelExpert(live=1, last=1, generations={1: "ready"}),
            "gone": ModelExpert(state="retired", last=7),
        }
        self.jobs: list[ModelJob] = []
        self.routers: dict[int, dict[str, int]] = {2: {"a": 3, "b": 1}}
        self.router = 2
        self.given_up: set[int] = set()
        self.aliases: dict[str, str] = {}
        self.leases: dict[str, str] = {}

    # -- what is looked at ----------------------------------------------------------------------------

    def known(self, name: str) -> ModelExpert:
        expert = self.experts.get(name)
        if expert is None or not expert.known:
            raise UnknownExpertError
        return expert

    def served(self, name: str) -> ModelExpert:
        expert = self.known(name)
        if expert.state == "retired":
            raise UnknownExpertError
        return expert

    @staticmethod
    def current(expert: ModelExpert, expected: int | None) -> None:
        if expected is not None and (expert.state == "retired" or expert.live != expected):
            raise GenerationConflictError

    @staticmethod
    def usable(expert: ModelExpert, number: int) -> None:
        if number not in expert.generations:
            raise RecordNotFoundError
        if expert.generations[number] != "ready":
            raise TransitionError

    def usable_router(self, number: int) -> dict[str, int]:
        if number not in self.routers:
            raise RecordNotFoundError
        if number in self.given_up:
            raise TransitionError
        return self.routers[number]

    def running(self) -> ModelJob | None:
        return next((job for job in self.jobs if job.state == "running"), None)

    def target(self, name: str, replace: bool, expected: int | None) -> None:
        expert = self.experts.get(name)
        used = expert is not None and expert.used
        if expected is not None:
            if not used:
                raise UnknownExpertError
            if expert is not None and expert.live != expected:
                raise GenerationConflictError
        elif used and not replace:
            raise DuplicateExpertError

    @contextmanager
    def change(self) -> Iterator[None]:
        yield
        self.revision += 1

    # -- jobs -----------------------------------------------------------------------------------------

    def submit(self, name: str, replace: bool, expected: int | None, limit: int | None = LIMIT) -> ModelJob:
        waiting = [job for job in self.jobs if job.state in OPEN]
        if limit is not None and len(waiting) >= limit:
            raise RegistryFullError
        if any(job.name == name for job in waiting):
            raise TransitionError
        self.target(name, replace, expected)
        if name in self.aliases or name == "family":
            raise DuplicateExpertError
        with self.change():
            expert = self.experts.setdefault(name, ModelExpert())
            expert.last += 1
            expert.generations[expert.last] = "registering"
            job = ModelJob("", name, expert.last, replace, expected)
            self.jobs.append(job)
        return job

    def claim(self, owner: str) -> ModelJob | None:
        job = next((job for job in self.jobs if job.state == "queued"), None)
        if job is None or self.running():
            return None
        with self.change():
            job.state, job.owner, job.attempt = "running", owner, job.attempt + 1
        return job

    def fence(self, job: ModelJob, attempt: int) -> None:
        if job.state != "running" or job.attempt != attempt:
            raise JobLostError

    def end(self, job: ModelJob, state: str) -> None:
        job.state = state
        if state != "succeeded":
            self.experts[job.name].generations[job.number] = "failed"

    def publish(
        self,
        job: ModelJob,
        attempt: int,
        profiles: Mapping[str, int] | None,
        fitted_on: int,
        activate: bool,
        trial: Trial | None,
    ) -> None:
        if job.state == "succeeded" and job.attempt == attempt:
            return
        self.fence(job, attempt)
        if job.cancelling:
            with self.change():
                self.end(job, "cancelled")
            raise JobLostError
        if profiles is not None and fitted_on != self.router:
            raise StaleRouterError
        expert = self.experts[job.name]
        back = expert.state == "retired"
        live = activate and trial is None and (back or not expert.pinned)
        if live or expert.live is None:
            self.target(job.name, job.replace, job.expected)
        if trial is not None:
            self.room(job.name, trial)
        with self.change():
            expert.generations[job.number] = "ready"
            number = max(self.routers) + 1
            if profiles is not None:
                self.routers[number] = dict(profiles)
            if back:
                expert.state, expert.pinned, expert.live = "active", False, None
            if live:
                self.go_live(expert, job.number)
                self.router = number if profiles is not None else self.router
            if trial is not None:
                made = number if profiles is not None else None
                expert.trial = Trial(job.name, job.number, trial.kind, trial.percent, made)
            self.end(job, "succeeded")

    def fail(self, job: ModelJob, attempt: int) -> None:
        if job.state == "failed" and job.attempt == attempt:
            return
        self.fence(job, attempt)
        with self.change():
            self.end(job, "failed")

    def cancel(self, job: ModelJob) -> None:
        if job.state not in OPEN:
            raise TransitionError
        if job.state == "running" and job.cancelling:
            return
        with self.change():
            self.stop(job)

    def stop(self, job: ModelJob) -> None:
        if job.state == "queued":
            self.end(job, "cancelled")
        else:
            job.cancelling = True

    def cancelled(self, job: ModelJob, attempt: int) -> None:
        if job.state == "cancelled" and job.attempt == attempt:
            return
        self.fence(job, attempt)
        with self.change():
            self.end(job, "cancelled")

    def retry(self, job: ModelJob) -> ModelJob:
        if job.state not in ("failed", "cancelled"):
            raise TransitionError
        return self.submit(job.name, job.replace, job.expected, limit=None)

    def requeue(self, owner: str, attempts: int | None) -> None:
        job = self.running()
        if job is None or job.owner != owner:
            return
        with self.change():
            if job.cancelling:
                self.end(job, "cancelled")
            elif attempts is not None and job.deaths + 1 >= attempts:
                self.end(job, "failed")
            else:
                job.state, job.owner = "queued", None
                job.deaths += attempts is not None

    # -- experts --------------------------------------------------------------------------------------

    @staticmethod
    def go_live(expert: ModelExpert, number: int) -> None:
        expert.live = number
        if expert.trial is not None and expert.trial.generation == number:
            expert.trial = None

    def may_serve(self, name: str, number: int, router: int | None) -> None:
        self.usable(self.experts[name], number)
        if name in self.aliases:
            raise DuplicateExpertError
        if router is not None and self.usable_router(router) != {**self.routers[self.router], name: number}:
            raise StaleRouterError

    def activate(self, name: str, number: int, expected: int | None, router: int | None) -> None:
        expert = self.known(name)
        self.current(expert, expected)
        self.may_serve(name, number, router)
        with self.change():
            self.router = self.router if router is None else router
            if expert.state == "retired":
                expert.state, expert.pinned = "active", False
            self.go_live(expert, number)

    def pin(self, name: str, number: int | None, expected: int | None, router: int | None) -> None:
        expert = self.served(name)
        self.current(expert, expected)
        if number is not None:
            self.may_serve(name, number, router)
        with self.change():
            expert.pinned = number is not None
            if number is not None:
                self.router = self.router if router is None else router
                self.go_live(expert, number)

    def set_state(self, name: str, state: str, expected: int | None) -> None:
        expert = self.served(name)
        self.current(expert, expected)
        if state == "active":
            if expert.live is None:
                raise TransitionError
            self.usable(expert, expert.live)
        with self.change():
            expert.state = state
            if state == "retired":
                expert.trial, expert.pinned = None, False
                self.aliases = {alias: each for alias, each in self.aliases.items() if each != name}
                for job in self.jobs:
                    if job.name == name and job.state in OPEN:
                        self.stop(job)

    def room(self, name: str, trial: Trial) -> None:
        others = [it.trial.percent for key, it in self.experts.items() if key != name and it.trial]
        if sum(others) + trial.percent > 100:
            raise TransitionError

    def try_out(self, name: str, trial: Trial | None, expected: int | None) -> None:
        expert = self.served(name)
        self.current(expert, expected)
        if trial is not None:
            if trial.generation == expert.live:
                raise TransitionError
            self.room(name, trial)
            self.usable(expert, trial.generation)
            if trial.router is not None:
                self.usable_router(trial.router)
        with self.change():
            expert.trial = trial

    def set_alias(self, alias: str, name: str) -> None:
        expert = self.experts.get(alias)
        named = expert is not None and expert.state != "retired" and (expert.live or expert.trial)
        if named or alias == "family" or any(job.name == alias and job.state in OPEN for job in self.jobs):
            raise DuplicateExpertError
        self.served(name)
        with self.change():
            self.aliases[alias] = name

    def remove_alias(self, alias: str) -> None:
        if alias not in self.aliases:
            raise RecordNotFoundError
        with self.change():
            del self.aliases[alias]

    # -- garbage --------------------------------------------------------------------------------------

    def collectable(self, keep: int, retired_stay: bool = False) -> set[tuple[str, int]]:
        """Without regard to replicas that are behind: the machine's replicas are up to date."""
        trials = {each.trial.router for each in self.experts.values() if each.trial and each.trial.router}
        known = {self.router, *trials}
        found = set()
        for name, expert in self.experts.items():
            ready = sorted((n for n, state in expert.generations.items() if state == "ready"), reverse=True)
            gone = expert.state == "retired"
            for number in ready if gone and not retired_stay else ready[keep:]:
                tried = expert.trial is not None and expert.trial.generation == number
                profiled = any(self.routers[each].get(name) == number for each in known)
                serves = not gone and (expert.live == number or tried or profiled)
                if not serves and f"{name}@{number}" not in self.leases.values():
                    found.add((name, number))
        return found

    def collect(self, chosen: set[tuple[str, int]], keep: int, retired_stay: bool) -> None:
        chosen &= self.collectable(keep, retired_stay)
        for name, number in chosen:
            self.experts[name].generations[number] = "collected"
        trials = {each.trial.router for each in self.experts.values() if each.trial}
        useless = {
            number
            for number, profiles in self.routers.items()
            if number not in {self.router, *trials, *self.given_up}
            and any(self.experts[name].generations[n] != "ready" for name, n in profiles.items())
        }
        self.given_up |= useless
        if chosen or useless:
            self.revision += 1

    def prune(self) -> set[tuple[str, int]]:
        """All of it is old; the generations that go."""
        ended = [job for job in self.jobs if job.state not in OPEN]
        coming = {job.name for job in self.jobs if job.state in OPEN}
        told = [profiles for number, profiles in self.routers.items() if number not in self.given_up]
        gone = set()
        for name, expert in self.experts.items():
            once = [n for n, state in expert.generations.items() if state in ("ready", "collected")]
            kept = {expert.live, max(once, default=None), *(profiles.get(name) for profiles in told)}
            for number, state in expert.generations.items():
                if state in ("failed", "collected") and number not in kept and name not in coming:
                    gone.add((name, number))
        useless = self.given_up - {max(self.routers)}
        if ended or gone or useless:
            self.revision += 1
        self.jobs = [job for job in self.jobs if job not in ended]
        for name, number in gone:
            del self.experts[name].generations[number]
        for number in useless:
            del self.routers[number]
        self.given_up -= useless
        return gone
