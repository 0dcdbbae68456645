"""The checks whether a box is fit for a job, before money is spent: facts in, checks out.

Each check is one line, always in the same order. All functions are pure. jobs/fitness.py judges
what training can also judge at its start, so that doctor and training say the same; the rest is
judged here. The thresholds are in env/limits.toml.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from env.settings import DEFAULT_FLAVOUR, Flavour, Limits, Provider
from jobs.errors import ToolkitError
from jobs.fitness import Finding, FitnessFacts, Folder, Gpu, access, judge, no_peer_access
from jobs.flavours import FlavourChoice, choose_flavour, flavours_without
from jobs.formatting import one_line, plural, size
from jobs.spec import Job, Scratch
from remote.ssh.link import Link
from remote.survey.facts import (
    BoxFacts,
    ClockOffset,
    GpuCard,
    HubRoute,
    Place,
    Runtime,
    place_of,
    reaches_gpus,
    route_of,
    runtime_of,
)

NOT_ASKED = "not asked"
CHECKS_OF_FACTS = (
    *("provider", "flavour", "driver", "cards", "capability", "P2P", "/dev/shm", "CPU and memory"),
    *("disk", "inodes", "Python", "Docker", "hub", "clock"),
)

Status = Literal["ok", "warning", "unfit", "unknown"]


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    value: str  # what was seen
    todo: str = ""  # what to do about it; "" if nothing

    def __str__(self) -> str:
        return one_line(f"{self.value}: {self.todo}" if self.todo else self.value)


@dataclass(frozen=True)
class Diagnosis:
    checks: tuple[Check, ...]
    job: str  # its name; "" without a job
    reached: bool = True

    @property
    def fit(self) -> bool:
        return bool(self.checks) and not any(check.status == "unfit" for check in self.checks)

    @property
    def verdict(self) -> str:
        """The result: `fit for opt-1.3b`, or `not fit for opt-1.3b: what, and what to do; ...`."""
        target = f" for {self.job}" if self.job else ""
        if not self.reached:
            return f"not fit{target}: the box was not reached"
        if not self.fit:
            return f"not fit{target}: " + "; ".join(str(check) for check in self.checks if check.status == "unfit")
        warnings = sum(check.status == "warning" for check in self.checks)
        return f"fit{target}" + (f", with {plural(warnings, 'warnings')}" if warnings else "")

    def lines(self) -> list[str]:
        """Return a line for each check, in columns, and the verdict."""
        shown = [check for check in self.checks if self.reached or check.value != NOT_ASKED]
        width = max((len(check.name) for check in shown), default=0)
        return [*(f"{check.status:<7}  {check.name:<{width}}  {check}" for check in shown), self.verdict]

    def as_json(self) -> dict[str, Any]:
        return {
            "job": self.job or None,
            "fit": self.fit,
            "verdict": self.verdict,
            "checks": [asdict(check) for check in self.checks],
        }


def diagnose(
    facts: BoxFacts | None,
    job: Job | None,
    limits: Limits,
    provider: Provider,
    link: Link,
    *,
    offset: ClockOffset | None = None,
    data_folder: str = "",
    prefer_route: str = "",
    flavour: str = "",
) -> Diagnosis:
    """Check a box for a job.

    facts: None if the box was not reached. data_folder, prefer_route: from boxes.yaml. flavour: the
    one that the user wishes, or "".
    """
    checks = [_reachable(link, facts), _host_key(link)]
    if facts is None:
        checks += [Check(name, "unknown", NOT_ASKED) for name in CHECKS_OF_FACTS]
    else:
        place = place_of(facts, provider, data_folder)
        seen = SurveyedBox(facts, job, limits, provider, runtime_of(facts), place, flavour)
        checks += [
            _provider(seen),
            _flavour(seen),
            _driver(seen),
            *_cards(seen),
            _capability(seen),
            _peers(seen),
            _shm(seen),
            _cpu_and_memory(seen),
            _disk(seen),
            _inodes(seen),
            _python(seen),
            _docker(seen),
            _hub(seen, prefer_route),
            _clock(offset, limits),
        ]
    return Diagnosis(tuple(checks), job.name if job else "", facts is not None)


# --- what is asked of the box ---------------------------------------------------------------------


@dataclass(frozen=True)
class SurveyedBox:
    """The facts, the job and the limits that the checks read."""

    facts: BoxFacts
    job: Job | None
    limits: Limits
    provider: Provider
    runtime: Runtime
    place: Place
    flavour_wish: str = ""  # the flavour that the user named

    @property
    def wants_gpu(self) -> bool:
        """Tell whether the job needs a GPU.

        With `device: auto`, a job that starts from random weights runs on the CPU if there is no
        GPU, and deploy prepares that.
        """
        if self.job is None:
            return self.facts.cards != ()
        return needs_gpu(self.job) or (self.job.hardware.device == "auto" and self.facts.cards != ())

    @cached_property
    def flavour(self) -> Flavour:
        """The flavour that deploy would make; where none runs, the one that is then spoken of."""
        try:
            choice = choose_for(self.facts, self.limits, wants_gpu=self.wants_gpu, wish=self.flavour_wish, job=self.job)
            return choice.flavour
        except ToolkitError:
            return self.limits.flavours.get(self.flavour_wish) or self.limits.flavours[DEFAULT_FLAVOUR]

    @property
    def ranks(self) -> int | None:
        wish = self.job.hardware.ranks if self.job else "auto"
        return (len(self.facts.cards) if self.facts.cards else None) if wish == "auto" else wish

    def judged(self, **known: Any) -> list[Finding]:
        """Let jobs/fitness.py judge these facts alone."""
        device = self.job.hardware.device if self.job else "auto"
        cuda = self.flavour.cuda if self.wants_gpu else None
        pretrained = self.job is not None and is_pretrained(self.job)
        return judge(FitnessFacts(device=device, cuda=cuda, pretrained=pretrained, **known), self.limits)


def needs_gpu(job: Job) -> bool:
    """Tell whether the job is meant for a GPU, whatever the box has."""
    device = job.hardware.device
    return device == "cuda" or (device == "auto" and is_pretrained(job))


def is_pretrained(job: Job) -> bool:
    return any(isinstance(model, str) for model in job.sources)


def hub_names(job: Job) -> list[str]:
    """List models and data sets that may have to come from the hub: names that are not paths."""
    models = [model for model in job.sources if not isinstance(model, Scratch)]
    names = [*dict.fromkeys(models), *job.data.names]
    looks_like_hub = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
    return [name for name in names if looks_like_hub.fullmatch(name) and not name.endswith((".jsonl", ".json"))]


# --- the checks -----------------------------------------------------------------------------------


def _of(name: str, value: str, findings: Iterable[Finding], todo: str = "") -> Check:
    """Make a check of findings, the worst first; without findings it is `ok`."""
    found = sorted(findings, key=lambda finding: finding.level != "unfit")
    if not found:
        return Check(name, "ok", value)
    todo = todo or "; ".join(dict.fromkeys(finding.todo for finding in found))
    return Check(name, found[0].level, "; ".join(finding.what for finding in found), todo)


def _reachable(link: Link, facts: BoxFacts | None) -> Check:
    if not link.reached and link.host_key == "changed":
        return Check("reachable", "unfit", "it answers, with another host key")
    if not link.reached:
        todo = link.todo or "check that it runs, and its address and port in boxes.yaml"
        return Check("reachable", "unfit", link.error or "no answer", todo)
    took = f"in {link.seconds * 1000:.0f} ms" if link.seconds is not None else "yes"
    if facts is None or not facts.complete:
        return Check("reachable", "warning", f"{took}, but the probe's answer broke off", "try again")
    if facts.late:
        value = f"{took}; no answer in time from: {', '.join(facts.late)}"
        return Check("reachable", "warning", value, "try again, or take another box")
    return Check("reachable", "ok", took)


def _host_key(link: Link) -> Check:
    shown = link.fingerprint or "not seen"
    if link.host_key == "changed":
        todo = "if the box was set up again, `fab trust --replace`; if not, somebody may be intercepting the connection"
        return Check("host key", "unfit", f"changed: {shown}", todo)
    if link.host_key == "new":
        return Check("host key", "ok", f"{shown}, seen for the first time")
    return Check("host key", "ok" if link.host_key == "known" else "unknown", shown)


def _provider(box: SurveyedBox) -> Check:
    facts = box.facts
    kind = "container" if facts.container else "machine"
    value = f"{box.provider.title}, {kind}; runtime {box.runtime.name} ({box.runtime.why})"
    if box.place.deployed:
        value += f"; deployed: {box.place.deployed.get('code', '?')[:12]}"
    if box.place.slot and box.place.slot_alive:
        value += f"; a job runs: {box.place.slot.get('run', '?')}"
    if facts.machine and facts.machine != box.limits.machine:
        todo = f"take a box with {box.limits.machine}; PyTorch for CUDA {box.flavour.cuda} is made for no other"
        return Check("provider", "unfit", f"{value}; its processor is {facts.machine}", todo)
    return Check("provider", "ok", value)


def choose_for(
    facts: BoxFacts, limits: Limits, *, wants_gpu: bool, wish: str = "", job: Job | None = None
) -> FlavourChoice:
    """Choose the flavour for a box; deploy makes what doctor says.

    Raises ToolkitError, as choose_flavour.
    """
    cards = [Gpu(card.name, card.capability) for card in facts.cards or ()] if wants_gpu else []
    cannot = flavours_without(job) if job is not None else {}
    return choose_flavour(limits, cards, facts.driver, cannot=cannot, wish=wish)


def _flavour(box: SurveyedBox) -> Check:
    try:
        choice = choose_for(box.facts, box.limits, wants_gpu=box.wants_gpu, wish=box.flavour_wish, job=box.job)
    except ToolkitError as error:
        return Check("flavour", "unfit", f"{error.what}: {error.why}" if error.why else error.what, error.hint)
    return Check("flavour", "ok", str(choice))


def _driver(box: SurveyedBox) -> Check:
    facts = box.facts
    if not box.wants_gpu:
        return Check("driver", "ok", facts.driver or "none, and this job needs none")
    if facts.driver is None and facts.cards is None:
        todo = "run `nvidia-smi` there; if it hangs, take another box"
        return Check("driver", "unknown", facts.smi_error or "nvidia-smi does not answer", todo)
    if facts.driver is None:
        return Check("driver", "unknown", "none is loaded")  # the check `cards` says what to do
    wanted = f"{facts.driver}, for CUDA {box.flavour.cuda}"
    return _of("driver", wanted, box.judged(driver=facts.driver))


def _cards(box: SurveyedBox) -> Iterator[Check]:
    facts = box.facts
    if facts.cards is None:
        if box.wants_gpu:
            value = facts.smi_error or "nvidia-smi does not answer"
            status: Status = "unfit" if facts.smi_error else "unknown"
            yield Check("cards", status, value, "start the box again, or take another")
        else:
            yield Check("cards", "ok", "not known, and this job needs none")
    elif not facts.cards:
        missing = box.judged(cards=(), driver=facts.driver)
        if box.wants_gpu:
            yield _of("cards", "none", missing)
        elif box.job is None or box.job.hardware.device == "cpu":
            yield Check("cards", "ok", "none" + (", and this job needs none" if box.job else ""))
        else:
            todo = "take a box with a GPU; if the CPU is intended, --set hardware.device=cpu"
            yield Check("cards", "warning", "none: the job will run on the CPU", todo)
    for card in facts.cards or ():
        yield _card(box, card)
    if facts.cards and box.wants_gpu and box.ranks is not None and box.ranks > len(facts.cards):
        value = f"the job asks for {box.ranks} ranks, and the box has {plural(len(facts.cards), 'cards')}"
        yield Check("ranks", "unfit", value, "take a box with more cards, or --set hardware.ranks=auto")


def _card(box: SurveyedBox, card: GpuCard) -> Check:
    limits, name = box.limits.gpu_health, f"card {card.index}"
    value = card.name or "a card"
    if card.total_bytes is not None and card.used_bytes is not None:
        value += f", {size(card.total_bytes)}, {size(card.used_bytes)} in use"
    found: list[Finding] = []
    if box.wants_gpu:
        used = (*(None for _ in range(card.index)), card.used_bytes)
        holders = tuple(holder for holder in box.facts.holders if holder.gpu in (None, card.index))
        found += box.judged(gpu_used_bytes=used, gpu_holders=holders)
    avoid = "take another box: this card ends runs, or computes wrong" if box.wants_gpu else "this job does not use it"
    bad: Literal["unfit", "warning"] = "unfit" if box.wants_gpu else "warning"
    if (card.ecc_now or 0) > limits.ecc_uncorrected_max:
        errors = plural(card.ecc_now, "uncorrected memory errors")
        found.append(Finding(bad, f"{errors} (ECC) since its driver was loaded", avoid))
    for numbers, level in ((limits.xid_unfit, bad), (limits.xid_warning, "warning")):
        if logged := [str(xid) for xid in card.xids if xid in numbers]:
            todo = avoid if level == "unfit" else "it may be over; if a run ends with a CUDA error, take another box"
            found.append(Finding(level, f"the kernel logged Xid {', '.join(logged)} for it", todo))
    check = _of(name, value, found)
    return replace(check, value=f"{value}; {check.value}") if found else check


def _capability(box: SurveyedBox) -> Check:
    cards = tuple(Gpu(card.name, card.capability) for card in box.facts.cards or ())
    shown = ", ".join(dict.fromkeys(card.capability or "?" for card in cards))
    if not cards or not box.wants_gpu:
        is_known = box.facts.cards is not None or not box.wants_gpu
        return Check("capability", "ok" if is_known else "unknown", shown or "no card to look at")
    wanted = box.limits.cuda[box.flavour.cuda]
    value = f"{shown}; CUDA {box.flavour.cuda} supports {wanted.capability_min} to {wanted.capability_max}"
    if all(card.capability is None for card in cards):
        todo = "look the card up: Volta to Hopper run with cu118, Blackwell (RTX 50, B200) with --flavour cu130"
        return Check("capability", "unknown", "nvidia-smi does not say", todo)
    return _of("capability", value, box.judged(cards=cards))


def fitness_facts(facts: BoxFacts) -> FitnessFacts:
    """Collect what jobs/fitness.py needs to know of the box's GPUs."""
    access = [peer.access for peer in facts.peers if peer.access is not None]
    return FitnessFacts(
        driver=facts.driver,
        cards=tuple(Gpu(card.name, card.capability) for card in facts.cards or ()) or None,
        peer_access=any(access) if access else None,
        peer_copies_wrong=any(peer.access and peer.result == "wrong" for peer in facts.peers),
    )


def peer_access_off(facts: BoxFacts, limits: Limits) -> str:
    """Return why this box's environment needs NCCL_P2P_DISABLE=1; "" if it does not.

    Training itself could find out all reasons but wrong copies.
    """
    return no_peer_access(fitness_facts(facts), limits)


def _peers(box: SurveyedBox) -> Check:
    facts = box.facts
    if not box.wants_gpu or (facts.cards is not None and len(facts.cards) < 2):
        return Check("P2P", "ok", "not needed")
    if facts.cards is None:
        return Check("P2P", "unknown", "no card to look at")
    staged = [peer for peer in facts.peers if peer.result == "wrong" and not peer.access]
    if staged:
        pair = f"GPU {staged[0].source} to GPU {staged[0].target}"
        return Check("P2P", "unfit", f"a copy through the main memory ({pair}) arrives changed", "take another box")
    failed = [peer for peer in facts.peers if peer.result.startswith("failed")]
    if failed:
        what = f"GPU {failed[0].source} to GPU {failed[0].target}: {failed[0].result}"
        return Check("P2P", "unfit", what, "take another box: training would fail at the same copy")
    if why := peer_access_off(facts, box.limits):
        return Check("P2P", "warning", why, "deploy sets NCCL_P2P_DISABLE=1 for this box; slower, but correct")
    pairs = len(facts.cards) * (len(facts.cards) - 1)
    if len(facts.peers) < pairs:
        reason = facts.peers_said or f"{len(facts.peers)} of {pairs} copies in time"
        value = f"{reason}, all correct" if facts.peers else f"not tried: {reason}"
        return Check("P2P", "unknown", value, "if the first update hangs, set NCCL_P2P_DISABLE=1")
    direct = sum(peer.access is True for peer in facts.peers)
    return Check("P2P", "ok", f"{direct} of {pairs} paths are direct, all {pairs} copies are correct")


def _shm(box: SurveyedBox) -> Check:
    free = box.facts.shm_free_bytes
    if box.runtime.name == "docker":
        return Check("/dev/shm", "ok", "the container's own (RLHF_SHM in docker-compose.yml, 8 GB)")
    if free is None:
        return Check("/dev/shm", "unknown", "not seen")
    found = box.judged(ranks=box.ranks, shared_memory_bytes=free)
    return _of("/dev/shm", f"{size(free)} free", found)


def _cpu_and_memory(box: SurveyedBox) -> Check:
    facts, cpu, memory = box.facts, box.limits.cpu, box.limits.memory
    cores, most, free = facts.cores, facts.memory_bytes, facts.memory_free_bytes
    if cores is None and most is None:
        return Check("CPU and memory", "unknown", "not seen")
    value = f"{_cores(cores)}, {size(most)}, {size(free)} of it free"
    larger, found = "take a larger box", []
    if cores is not None and cores < cpu.cores_min:
        what = f"only {_cores(cores)}, and {cpu.cores_min:g} is the minimum"
        found.append(Finding("unfit", what, f"{larger} (or start it with its card)"))
    ranks = box.ranks or 1
    if cores is not None and cpu.cores_min <= cores < cpu.cores_advised_per_rank * ranks:
        what = f"{_cores(cores)} for {ranks} ranks: the GPUs will wait for the CPU"
        found.append(Finding("warning", what, larger))
    if free is not None and free < memory.bytes_min:
        what = f"{size(free)} of memory are free, and a run needs at least {size(memory.bytes_min)}"
        found.append(Finding("unfit", what, f"end what runs there, or {larger}"))
    elif free is not None and free < memory.bytes_advised and box.job is not None and is_pretrained(box.job):
        what = f"only {size(free)} of memory are free, and {size(memory.bytes_advised)} are advised"
        found.append(Finding("warning", what, larger))
    return _of("CPU and memory", value, found)


def _cores(cores: float | None) -> str:
    return "? cores" if cores is None else plural(f"{cores:g}", "cores") if cores != 1 else "1 core"


def no_access(place: Place, facts: BoxFacts) -> list[Finding]:
    """Say why our folder on the box takes no files, with the command that mends it."""
    ours = FitnessFacts(uid=facts.uid, gid=facts.gid)
    return access(_folder(place), ours, elsewhere="name another data_folder in boxes.yaml")


def _folder(place: Place) -> Folder:
    return Folder(
        path=place.root,
        found=place.found,
        missing=place.missing,
        is_folder=place.is_folder is not False,
        writable=place.writable,
        read_only=place.read_only,
        uid=place.uid,
    )


def _disk(box: SurveyedBox) -> Check:
    place = box.place
    if not place.found:
        todo = "check that its disk is there, or name another data_folder in boxes.yaml"
        return Check("disk", "unknown", f"{place.root}: no answer from its disk", todo)
    folder = replace(_folder(place), free_bytes=place.free_bytes)
    value = f"{size(place.free_bytes) if place.free_bytes is not None else '?'} free at {place.found}"
    value += f" ({place.file_system})" if place.file_system else ""
    if blocked := no_access(place, box.facts):
        return _of("disk", value, blocked)
    found = box.judged(folders=(folder,), uid=box.facts.uid, gid=box.facts.gid)
    if not found and place.free_bytes is None:
        return Check("disk", "unknown", value)
    return _of("disk", value, found, todo="make room there, or name another data_folder in boxes.yaml")


def _inodes(box: SurveyedBox) -> Check:
    place = box.place
    if place.free_inodes is None and not place.found:
        return Check("inodes", "unknown", "not seen")
    if place.free_inodes is None:
        return Check("inodes", "ok", "this file system does not count them")
    folder = Folder(place.root, place.found, free_inodes=place.free_inodes)
    todo = "remove many small files (`df -i` and `du --inodes` show where), or name another data_folder in boxes.yaml"
    return _of("inodes", f"{place.free_inodes} free at {place.found}", box.judged(folders=(folder,)), todo=todo)


def _python(box: SurveyedBox) -> Check:
    wanted = box.flavour.python
    right = [python for python in box.facts.pythons if python.version.split(".")[:2] == wanted.split(".")]
    usable = [python for python in right if python.makes_venv]
    if box.runtime.name == "docker":
        return Check("Python", "ok", f"{wanted}, in the image")
    if usable:
        return Check("Python", "ok", f"{usable[0].version} at {usable[0].path}")
    if box.facts.condas:
        return Check("Python", "ok", f"{wanted} will be made by {box.facts.condas[0][0]}")
    if right:
        todo = f"apt-get install python{wanted}-venv"
        return Check("Python", "unfit", f"{right[0].path} has no venv or ensurepip", todo)
    seen = ", ".join(dict.fromkeys(python.version for python in box.facts.pythons)) or "none"
    what = f"no Python {wanted}, and no conda or uv to make it with (there is: {seen})"
    return Check("Python", "unfit", what, python_todo(wanted))


def python_todo(wanted: str) -> str:
    """Say how a box gets a Python that its distribution may not have."""
    return (
        f"install uv there, with which deploy makes Python {wanted}: `pip install uv`, or on Debian 12 and Ubuntu "
        "24.04 `apt-get install pipx && pipx install uv`; or take the provider's image that has it"
    )


WITHOUT_DOCKER = "without Docker the bare runtime is used"
DOCKER_HELP = {
    "daemon": "start it, or put this user into the group `docker`, which can do what root can; " + WITHOUT_DOCKER,
    "compose": f"install docker-compose-plugin (Compose 2); {WITHOUT_DOCKER}",
    "gpu": "install nvidia-container-toolkit, `nvidia-ctk runtime configure --runtime=docker`, "
    f"restart Docker (not Docker from snap); {WITHOUT_DOCKER}",
}


def _docker(box: SurveyedBox) -> Check:
    docker = box.facts.docker
    if not docker.client and not docker.server:
        return Check("Docker", "ok", "none, and none is needed: the bare runtime is used")
    if box.runtime.lacking:
        reason = docker.error
        if not reason and box.runtime.lacking == "gpu":
            saw_none = docker.gpu_code == 0 and not reaches_gpus(docker)
            reason = "a container saw no card" if saw_none else docker.gpu_said
        value = f"{box.runtime.why} ({reason})" if reason else box.runtime.why
        return Check("Docker", "warning", value, DOCKER_HELP[box.runtime.lacking])
    value = f"{docker.server}, Compose {docker.compose}" + (f", buildx {docker.buildx}" if docker.buildx else "")
    if box.facts.cards:
        if docker.gpu_code == 0:
            value += f"; a container saw {plural(docker.gpu_cards, 'cards')}"
        else:
            value += "; its GPU runtime is installed, not tried" + (f" ({docker.gpu_said})" if docker.gpu_said else "")
        if docker.gpu_code == 0 and docker.gpu_cards != len(box.facts.cards):
            return Check("Docker", "warning", f"{value} of {len(box.facts.cards)}", "restart Docker, or the box")
    if not docker.buildx:
        return Check("Docker", "warning", value, "install docker-buildx-plugin: the image is built with it")
    return Check("Docker", "ok", value)


def _hub(box: SurveyedBox, prefer: str) -> Check:
    shown = ", ".join(f"{route.name} {_way(route)}" for route in box.facts.routes)
    route = route_of(box.facts, box.limits, prefer)
    names = hub_names(box.job) if box.job else []
    if route is None:
        value = f"not reachable ({shown or 'not tried'})"
        if box.job is not None and not names:
            return Check("hub", "ok", f"{value}, and this job does not need it")
        todo = "give the box a `mirror` in boxes.yaml, or a proxy, or send models and data as local folders"
        failed: Status = "unfit" if names else "warning"
        return Check("hub", failed if box.facts.routes else "unknown", value, todo)
    value = f"{route.name} ({shown})"
    if (route.total_s or 0) > box.limits.hub.small_file_max_s:
        return Check("hub", "warning", f"{value}, which is slow for a small file", "try a `mirror` in boxes.yaml")
    return Check("hub", "ok", value)


def _way(route: HubRoute) -> str:
    if route.works:
        return f"{route.total_s:.2f} s"
    return f"HTTP {route.status}" if route.status else "no answer"


def _clock(offset: ClockOffset | None, limits: Limits) -> Check:
    if offset is None:
        return Check("clock", "unknown", "not seen")
    value = f"{abs(offset.seconds):.1f} s {'ahead' if offset.seconds >= 0 else 'behind'} (to {offset.within_s:.1f} s)"
    if abs(offset.seconds) - offset.within_s > limits.clock.offset_max_s:
        todo = "set it on the host (it cannot be set in a container); times in logs will be off by this much"
        return Check("clock", "warning", value, todo)
    return Check("clock", "ok", value)
