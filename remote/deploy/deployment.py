"""Deploying code and environment to a box: probe, sync, environment, self-check.

First one round trip asks what is on the box (land.sh). If all is as it should be, nothing is done.
Otherwise the lock is taken, and what is missing is sent or made next to its place. `deployed`,
which names all parts, is written last. If a deploy is killed at any moment, the one before it still
holds. Each stage is shown with the time it took.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from env.settings import DEFAULT_FLAVOUR, Limits, Provider
from jobs.errors import ExitCode, ToolkitError
from jobs.flavours import FlavourChoice, flavours_without
from jobs.formatting import duration, one_line, size
from jobs.spec import Job
from remote.deploy import lock, sync
from remote.deploy.sync import KEY_DIGITS, Tree
from remote.output import waiting
from remote.scripts import script
from remote.ssh import commands
from remote.survey.doctor import choose_for, diagnose, needs_gpu, no_access, peer_access_off, python_todo
from remote.survey.facts import BoxFacts, Python, home_path, place_of, provider_of, route_of, runtime_of
from remote.survey.probe_cache import CachedProbe, arguments, hub_mirror, probe, recall, remember

if TYPE_CHECKING:
    from remote.inventory import Box
    from remote.ssh.connection import BoxConnection

Say = Callable[[str], None]
Name = Literal["probe", "look", "lock", "sync", "environment", "settle"]

# What an environment is made of. If one of these files changes, it is another environment.
BARE_FILES = (
    *("env/pins/pip.txt", "env/torch_wheel.sh", "env/install_locked.sh"),
    "remote/on_box/environment.sh",
)
IMAGE_FILES = (
    *("docker/Dockerfile", "docker/install.sh", "docker/check_image.py", "docker/entrypoint", "docker/compose.cpu.yml"),
    *("env/pins/pip.txt", "env/torch_wheel.sh", "env/install_locked.sh", "env/cuda.sh"),
)
SENDINGS = 3  # attempts, for a checkout that changes while it is sent


@dataclass(frozen=True)
class DeployAction:
    """One stage that was done, or with --dry-run would be."""

    name: Name
    said: str
    seconds: float


@dataclass(frozen=True)
class DeployPlan:
    """What shall be on the box, from its facts and this checkout."""

    root: str
    code: str
    runtime: Literal["docker", "bare"]
    environment: str  # its key
    flavour: str  # a file of env/flavours
    torch: str  # a file of env/pins
    device: Literal["cuda", "cpu"]
    route: str
    mirror: str
    p2p_off: str  # why NCCL_P2P_DISABLE=1 is set; "" if it is not
    python: str = ""  # bare: the interpreter that makes the environment
    maker: str = ""  # bare: the conda or uv that first makes an interpreter
    env_files: tuple[str, ...] = ()
    proxy_files: tuple[str, ...] = ()
    build: tuple[tuple[str, str], ...] = ()  # docker: build arguments of boxes.yaml
    ca_bundle: str = ""  # on the box
    notes: tuple[str, ...] = ()

    @property
    def image(self) -> str:
        return f"rlhf-box:{self.environment}" if self.runtime == "docker" else ""

    @property
    def python_there(self) -> str:
        return f"{self.root}/env/{self.environment}/bin/python" if self.runtime == "bare" else ""

    @property
    def code_folder(self) -> str:
        return f"{self.root}/code/{self.code}"

    def lines(self) -> list[str]:
        """Return the lines of ROOT/deployed, without the time."""
        words = {
            "code": self.code,
            "runtime": self.runtime,
            "environment": self.environment,
            "python": self.python_there,
            "image": self.image,
            "route": self.route,
            "mirror": self.mirror,
            "p2p": "1" if self.p2p_off else "0",
            "device": self.device,
            "flavour": self.flavour,
            "torch": self.torch,
            "ca_bundle": self.ca_bundle,
        }
        files = [f"env_file {file}" for file in self.env_files] + [f"proxy_file {file}" for file in self.proxy_files]
        return [*(f"{key} {value}" for key, value in words.items() if value), *files]

    def settings(self, token: str) -> dict[str, str]:
        """Return the settings for remote/on_box/environment.sh."""
        proxy = self.proxy_files[0] if self.route == "proxy" and self.proxy_files else ""
        words = {
            "root": self.root,
            "token": token,
            "key": self.environment,
            "runtime": self.runtime,
            "flavour": self.flavour,
            "torch": self.torch,
            "mirror": self.mirror,
            "device": self.device,
            "python": self.python,
            "maker": self.maker,
            "proxy": proxy,
            "ca_bundle": self.ca_bundle,
        }
        return {key: value for key, value in words.items() if value}


@dataclass(frozen=True)
class BoxContents:
    """What is on the box, as `land.sh look` reports it."""

    root: Literal["ours", "none", "strange", "unknown"] = "unknown"
    identity: str = ""
    clock: int = 0
    free_kb: int | None = None
    tools: frozenset[str] = frozenset()
    code: bool = False  # the wanted code is whole on the box
    environment: bool = False
    image: bool = False
    like: str = ""  # the code that was deployed last
    deployed: tuple[str, ...] = ()  # the lines of ROOT/deployed, without the time
    time: int = 0
    slot: str = ""  # the run that holds the box
    owner: lock.Owner | None = None  # of the lock


@dataclass(frozen=True)
class DeployResult:
    plan: DeployPlan
    facts: BoxFacts
    changed: bool  # anything at all
    time: int  # of the last deploy that changed something, by the box's clock; 0: not known
    seconds: float
    parts: tuple[DeployAction, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        words = [line.partition(" ")[::2] for line in self.plan.lines()]
        lines = {key: value for key, value in words if key not in ("env_file", "proxy_file")}
        parts = [{"name": part.name, "said": part.said, "seconds": round(part.seconds, 3)} for part in self.parts]
        return {
            "root": self.plan.root,
            **lines,
            "changed": self.changed,
            "seconds": round(self.seconds, 3),
            "parts": parts,
            "notes": list(self.notes),
        }


def deploy(
    connection: BoxConnection,
    checkout: Path,
    box: Box,
    *,
    limits: Limits,
    providers: Mapping[str, Provider],
    state: Path,
    say: Say = lambda text: None,
    now: Say = lambda text: None,
    why: str = "fab deploy",
    job: Job | None = None,
    flavour: str = "",
    fresh: bool = False,
    rsync: str = "rsync",
) -> DeployResult:
    """Put the checkout and an environment for it on the box; do nothing if both are there.

    say: gets each line that stays: the begin and end of a stage, and notes. now: gets passing
    states such as pip's last line, each in place of the one before, and "" at the end. job: what is
    to run there; if it needs a GPU, the box will have one by then. flavour: the one that the user
    wishes, or "". fresh: probe the box even if it is known. rsync: the local program, "" for none.

    Raises ToolkitError: UNFIT if deploy itself cannot work on the box; BUSY; UNREACHABLE; errors of
    git or of the disk here.
    """
    return _Deploy(connection, checkout, box, limits, providers, state, say, now, why, job, flavour, rsync).run(fresh)


# --- plan: pure -----------------------------------------------------------------------------------


def plan_for(
    known: CachedProbe,
    box: Box,
    limits: Limits,
    provider: Provider,
    checkout: Path,
    code: str,
    *,
    job: Job | None = None,
    flavour: str = "",
) -> DeployPlan:
    """Plan a deploy. Raises ToolkitError: UNFIT, with what deploy needs and the box lacks.

    job: that will run, if it is known; if it needs a GPU, so does the plan, also on a box that has
    none yet (a mode without a card costs less). flavour: the one that the user wishes, or "".
    """
    facts = known.facts
    root = place_of(facts, provider, box.data_folder).root
    runtime = _runtime(facts, box)
    on_cpu = box.build.get("TORCH", "").endswith("-cpu")
    is_without_card = facts.cards == () and job is not None and needs_gpu(job) and not on_cpu
    device: Literal["cuda", "cpu"] = "cuda" if facts.cards != () or is_without_card else "cpu"
    wish = flavour or box.build.get("FLAVOUR", "")
    choice = _flavour(facts, limits, device == "cuda", wish, job)
    made = choice.flavour.name
    torch = box.build.get("TORCH") or f"torch-{made}{'' if device == 'cuda' else '-cpu'}"
    route = route_of(facts, limits, "mirror" if box.mirror not in ("", "default") else "")
    mirror = box.mirror or (hub_mirror(box) if route and route.name == "mirror" else provider.mirror)
    elsewhere = ("CA_BUNDLE", "TORCH", "FLAVOUR")  # they are fields of the plan, or sent
    build: dict[str, str] = {key: value for key, value in box.build.items() if key not in elsewhere}
    if device == "cpu":
        build = {"CUDA_ARCHS": "", **build}
    python, maker = ("", "") if runtime == "docker" else _python(facts, choice.flavour.python)
    notes = [f"flavour {choice}"] if choice.why != "the default" else []
    notes += [] if route else ["the box cannot reach the model hub: send models and data as local folders"]
    if is_without_card:
        notes.append(
            "the box has no GPU now, and the job needs one: the environment is made for CUDA "
            "(for the CPU: --set hardware.device=cpu)"
        )
    if why := peer_access_off(facts, limits):
        notes.append(f"GPUs will not copy to each other directly (NCCL_P2P_DISABLE=1): {why}")
    return DeployPlan(
        root=root,
        code=code,
        runtime=runtime,
        environment=environment_key(checkout, runtime, made, torch, mirror, build, device),
        flavour=made,
        torch=torch,
        device=device,
        route=route.name if route else "direct",
        mirror=mirror,
        p2p_off=why,
        python=python,
        maker=maker,
        env_files=tuple(home_path(file, facts) for file in provider.env_files),
        proxy_files=tuple(home_path(file, facts) for file in provider.proxy_files),
        build=tuple(sorted(build.items())) if runtime == "docker" else (),
        notes=tuple(notes),
    )


def environment_key(
    checkout: Path, runtime: str, flavour: str, torch: str, mirror: str, build: Mapping[str, str], device: str
) -> str:
    """Return a key that names an environment by what it is made of.

    The mirror is part of an image's key, since it sets the image's settings. It is not part of a
    bare environment's: the packages are the same from anywhere.
    """
    files = [
        *(f"env/flavours/{flavour}.env", f"env/pins/{flavour}.txt", f"env/pins/{torch}.txt"),
        *(BARE_FILES if runtime == "bare" else (*IMAGE_FILES, f"env/mirrors/{mirror}.env")),
    ]
    made_of = hashlib.sha256(f"{runtime}\0".encode())
    for file in sorted(files):
        try:
            made_of.update(f"{file}\0".encode() + hashlib.sha256((checkout / file).read_bytes()).digest())
        except OSError as error:
            raise ToolkitError(
                f"there is no {file} in the checkout",
                why=error.strerror or "",
                hint="mend `build` and `mirror` in boxes.yaml",
            ) from None
    if runtime == "docker":
        made_of.update(repr((device, sorted(build.items()))).encode())
    return made_of.hexdigest()[:KEY_DIGITS]


def _flavour(facts: BoxFacts, limits: Limits, wants_gpu: bool, wish: str, job: Job | None) -> FlavourChoice:
    """Choose the flavour. Raises ToolkitError: UNFIT, if the wished one, or none, runs the job.

    Where only cards or driver speak against all, the default is made, as doctor's notes say: files
    can be moved to that box all the same.
    """
    try:
        return choose_for(facts, limits, wants_gpu=wants_gpu, wish=wish, job=job)
    except ToolkitError:
        if wish or (job is not None and flavours_without(job)):
            raise
        return FlavourChoice(limits.flavours[DEFAULT_FLAVOUR], "the default")


def _runtime(facts: BoxFacts, box: Box) -> Literal["docker", "bare"]:
    found = runtime_of(facts)
    if box.runtime == "docker" and found.name != "docker":
        raise ToolkitError(
            f"`{box.name}` cannot run Docker: {found.why}",
            why="boxes.yaml says `runtime: docker`",
            hint=f"fab doctor --host {box.name} says what to do; or `runtime: auto`",
            exit_code=ExitCode.UNFIT,
        )
    return found.name if box.runtime == "auto" else box.runtime


def _python(facts: BoxFacts, version: str) -> tuple[str, str]:
    """Return (a Python of this version, "") or ("", the program that makes one)."""
    wanted = version.split(".")
    right = [python for python in facts.pythons if python.version.split(".")[:2] == wanted and python.makes_venv]
    if right:
        return min(right, key=_is_conda).path, ""
    return "", facts.condas[0][0] if facts.condas else ""


def _is_conda(python: Python) -> bool:
    return "conda" in python.path  # its conda environment may be removed by somebody else


def check_fit(
    known: CachedProbe, plan: DeployPlan, contents: BoxContents, box: Box, limits: Limits, provider: Provider
) -> None:
    """Check what deploy itself needs; doctor checks all else.

    Raises ToolkitError: UNFIT.
    """
    facts, place = known.facts, place_of(known.facts, provider, box.data_folder)
    other_folder = "name another data_folder in boxes.yaml"

    def unfit(why: str, hint: str) -> ToolkitError:
        return ToolkitError(f"cannot deploy to `{box.name}`", why=why, hint=hint, exit_code=ExitCode.UNFIT)

    if facts.machine and facts.machine != limits.machine:
        raise unfit(
            f"its processor is {facts.machine}",
            f"take a box with {limits.machine}: PyTorch {plan.torch} is made for no other",
        )
    if contents.root == "strange":
        raise unfit(f"{plan.root} exists, and is not ours", f"move it away, or {other_folder}")
    if not re.fullmatch(r"/[^\n]*", plan.root):
        raise unfit(f"our folder would be {one_line(plan.root)}", "name an absolute data_folder in boxes.yaml")
    if contents.root != "ours":
        if not place.found:
            raise unfit(f"{place.root}: no answer from its disk", f"check that its disk is there, or {other_folder}")
        if blocked := no_access(place, facts):
            raise unfit(blocked[0].what, blocked[0].todo)
    if not contents.tools & {"rsync", "tar"}:
        raise unfit("it has neither rsync nor tar", "apt-get install rsync")
    free = contents.free_kb * 1024 if contents.free_kb is not None else place.free_bytes
    has_environment = _has_environment(plan, contents)
    needed = limits.disk.bytes_min
    if plan.runtime == "bare" and not has_environment:
        needed = limits.environment.bytes_cpu if plan.device == "cpu" else limits.environment.bytes_cuda
        if not plan.python and not plan.maker:
            seen = ", ".join(dict.fromkeys(python.version for python in facts.pythons)) or "none"
            wanted = limits.flavours[plan.flavour].python
            raise unfit(
                f"no Python {wanted} with venv, and no conda or uv to make it with (Pythons on the box: {seen})",
                python_todo(wanted),
            )
    is_installed = has_environment and contents.code
    if place.free_inodes is not None and place.free_inodes < limits.disk.inodes_min and not is_installed:
        raise unfit(
            f"{place.free_inodes} inodes are free at {plan.root}, and {limits.disk.inodes_min} are needed",
            f"remove many small files there, or {other_folder}",
        )
    if free is not None and free < needed and not is_installed:
        raise unfit(
            f"{size(free)} are free at {plan.root}, and {size(needed)} are needed",
            f"make room there, or {other_folder}",
        )


def parse_look(text: str) -> BoxContents:
    """Parse the answer of `land.sh look`. Raises ToolkitError: the answer broke off."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        values.setdefault(key, []).append(value)
    if "end" not in values:
        raise ToolkitError(
            "the box's answer broke off", why=one_line(text[-300:]), hint="try again", exit_code=ExitCode.UNREACHABLE
        )

    def first(key: str) -> str:
        return values.get(key, [""])[0]

    def number(key: str) -> int | None:
        return int(first(key)) if first(key).lstrip("-").isdecimal() else None

    lines = values.get("deployed", [])
    times = [line.removeprefix("time ") for line in lines if line.startswith("time ")]
    root = first("root")
    return BoxContents(
        root=root if root in ("ours", "none", "strange") else "unknown",  # type: ignore[arg-type]
        identity=first("identity"),
        clock=number("clock") or 0,
        free_kb=number("free"),
        tools=frozenset(values.get("tool", [])),
        code="code" in values,
        environment="environment" in values,
        image="image" in values,
        like=first("like"),
        deployed=tuple(line for line in lines if not line.startswith("time ")),
        time=int(times[0]) if times and times[0].isdecimal() else 0,
        slot=first("slot"),
        owner=lock.owner_of(text.splitlines()),
    )


def _has_environment(plan: DeployPlan, contents: BoxContents) -> bool:
    return contents.environment if plan.runtime == "bare" else contents.image


def is_whole(plan: DeployPlan, contents: BoxContents) -> bool:
    has_all = contents.root == "ours" and contents.code and _has_environment(plan, contents)
    return has_all and sorted(contents.deployed) == sorted(plan.lines())


# --- what is done ---------------------------------------------------------------------------------


@dataclass
class _Deploy:
    """One call of `deploy`."""

    connection: BoxConnection
    checkout: Path
    box: Box
    limits: Limits
    providers: Mapping[str, Provider]
    state: Path
    say: Say
    now: Say
    why: str
    job: Job | None
    flavour: str
    rsync: str
    parts: list[DeployAction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Notes are held back until it is sure that no error replaces them, such as a lock that is held.
    are_told: bool = False

    def run(self, fresh: bool) -> DeployResult:
        started = time.monotonic()
        tree = sync.checkout_tree(self.checkout)
        self._note(sync.check_size(tree))
        for name in tree.left_out:
            self._note(f"not sent: {name} is a repository of its own")
        known, plan, contents = self._look(tree, fresh)
        changed = not is_whole(plan, contents)
        for note in plan.notes:
            self._note(note)
        if changed:
            check_fit(known, plan, contents, self.box, self.limits, self._provider(known))
            plan = self._change(tree, known, plan, contents)
        self._tell()
        if not self.connection.dry_run:
            remember(self.state, self.box.name, replace(known, identity=contents.identity, root=plan.root))
        deployed_at, seconds = 0 if changed else contents.time, time.monotonic() - started
        notes = tuple(dict.fromkeys(self.notes))
        return DeployResult(plan, known.facts, changed, deployed_at, seconds, tuple(self.parts), notes)

    def _note(self, note: str) -> None:
        if note and note not in self.notes:
            self.notes.append(note)
            if self.are_told:
                self.say(f"note: {note}")

    def _tell(self) -> None:
        """Say the notes so far; from now on each is said immediately."""
        for note in [] if self.are_told else self.notes:
            self.say(f"note: {note}")
        self.are_told = True

    def _done(self, name: Name, said: str, seconds: float) -> None:
        self.parts.append(DeployAction(name, said, seconds))
        self.say(f"{name}: {said} ({_seconds(seconds)})")

    def _changed(self, name: Name, said: str, would: str, seconds: float) -> None:
        """Report a stage that was done, or with --dry-run would be."""
        if not self.connection.dry_run:
            self._done(name, said, seconds)
            return
        self.parts.append(DeployAction(name, would, seconds))
        self.say(f"{name}: {would}")

    def _provider(self, known: CachedProbe) -> Provider:
        return provider_of(known.facts, self.providers, self.box.provider)

    # --- what is there

    def _look(self, tree: Tree, fresh: bool) -> tuple[CachedProbe, DeployPlan, BoxContents]:
        """Look at the box. The facts that are remembered are used if the box is still the same."""
        known = None if fresh else recall(self.state, self.box.name)
        if known is not None and known.identity and known.asked == arguments(self.box, self.providers):
            plan, contents = self._look_for(tree, known)
            if contents.identity == known.identity and contents.root != "unknown":
                return known, plan, contents
            self.say(f"{self.box.name} was restarted, or is another box: probing it again")
        began = time.monotonic()
        known = probe(self.connection, self.box, self.providers, self.now)
        provider, runtime = self._provider(known), runtime_of(known.facts)
        self._done("probe", f"{provider.title}; {runtime.name} ({runtime.why})", time.monotonic() - began)
        link = self.connection.link
        wish = self.flavour or self.box.build.get("FLAVOUR", "")
        folder = self.box.data_folder
        found = diagnose(known.facts, None, self.limits, provider, link, data_folder=folder, flavour=wish)
        for check in found.checks:
            if check.status in ("unfit", "warning"):
                self._note(f"{check.name}: {check}")
        plan, contents = self._look_for(tree, known)
        return known, plan, contents

    def _plan(self, known: CachedProbe, tree: Tree) -> DeployPlan:
        provider = self._provider(known)
        wish = self.flavour
        return plan_for(known, self.box, self.limits, provider, self.checkout, tree.key, job=self.job, flavour=wish)

    def _look_for(self, tree: Tree, known: CachedProbe) -> tuple[DeployPlan, BoxContents]:
        began = time.monotonic()
        plan = self._plan(known, tree)
        if bundle := self._bundle():
            plan = replace(plan, ca_bundle=f"{plan.root}/inputs/{bundle.key}/{bundle.files[0].name}")
        environment, image = (plan.environment, "-") if plan.runtime == "bare" else ("-", plan.image)
        argv = commands.sh_script("look", plan.root, tree.key, environment, image)
        contents = parse_look(self.connection.query(argv, stdin=script("land.sh")).out)
        outcome = "already up to date" if is_whole(plan, contents) else _lacking(plan, contents)
        self._done("look", outcome, time.monotonic() - began)
        return plan, contents

    def _bundle(self) -> Tree | None:
        """Return the certificates of boxes.yaml's build.CA_BUNDLE, which are sent as a file."""
        if not (path := self.box.build.get("CA_BUNDLE")):
            return None
        file = Path(path).expanduser().resolve()
        tree = sync.tree_of(file.parent, [file.name])
        if not tree.files:
            raise ToolkitError(
                f"there is no file {file}", why="build.CA_BUNDLE of boxes.yaml names it", hint="mend its path"
            )
        return tree

    # --- what is changed

    def _change(self, tree: Tree, known: CachedProbe, plan: DeployPlan, contents: BoxContents) -> DeployPlan:
        began = time.monotonic()
        held = lock.take(
            self.connection,
            plan.root,
            tree.key,
            why=self.why,
            laptop=lock.laptop_id(self.state),
            seen=contents.owner,
            size_bytes=0 if contents.code else tree.size_bytes,
        )
        if held.took_over:
            self._note(f"the lock was taken over from {held.took_over}")
        taken = "taken" + (f" over from {held.took_over}" if held.took_over else "")
        would = "would be taken" + (f"; now it is held by {contents.owner}" if contents.owner else "")
        self._changed("lock", taken, would, time.monotonic() - began)
        self._tell()
        settled = False
        try:
            settled, plan = self._locked(tree, known, plan, contents, held)
        finally:
            if not settled:
                # If the connection is dead, the lock stays. The next deploy from this laptop sees
                # that this one is gone; one from elsewhere waits until the lock expires.
                with suppress(ToolkitError):
                    lock.release(self.connection, held)
        return plan

    def _locked(
        self, tree: Tree, known: CachedProbe, plan: DeployPlan, contents: BoxContents, held: lock.Lock
    ) -> tuple[bool, DeployPlan]:
        has_environment = _has_environment(plan, contents)
        settled = False
        if (bundle := self._bundle()) and f"ca_bundle {plan.ca_bundle}" not in contents.deployed:
            folder, rsync_there = str(PurePosixPath(plan.ca_bundle).parent), "rsync" in contents.tools
            sync.send_whole(self.connection, bundle, folder, rsync_there=rsync_there, rsync=self.rsync, now=self.now)
        if not contents.code:
            plan = self._send(tree, known, plan, contents, held, plan.lines() if has_environment else [])
            settled = has_environment
        if not has_environment:
            self._make_environment(plan, held)
        if not settled:
            began = time.monotonic()
            argv = commands.sh_script("settle", plan.root, held.token, *plan.lines())
            answer = self.connection.change(argv, stdin=script("land.sh"), timeout_s=600.0, check=False)
            self._settled(answer.out, answer.code)
            if answer.code:
                raise lock.refused(self.box.name, "write what is deployed", answer)
            would = "would record what is deployed"
            self._changed("settle", _settled_words(answer.out), would, time.monotonic() - began)
        return True, plan

    def _send(
        self,
        tree: Tree,
        known: CachedProbe,
        plan: DeployPlan,
        contents: BoxContents,
        held: lock.Lock,
        lines: Sequence[str],
    ) -> DeployPlan:
        """Send the code, and have the box verify it; with `lines` it also becomes what is deployed.

        Returns the plan for the checkout as it was sent: it may have changed meanwhile.
        """
        began, compare, rsync_there = time.monotonic(), False, "rsync" in contents.tools
        like = f"{plan.root}/code/{contents.like}" if contents.like else ""
        for attempt in range(1, SENDINGS + 1):
            try:
                sent = sync.send(
                    self.connection,
                    tree,
                    plan.code_folder,
                    like=like,
                    rsync_there=rsync_there,
                    rsync=self.rsync,
                    compare=compare,
                    what=f"sync: {tree}",
                    now=self.now,
                )
                deployed = plan.lines() if lines else []
                more = (plan.root, held.token, *deployed)
                answer = sync.land(self.connection, tree, plan.code_folder, *more, now=self.now)
                break
            except sync.UploadDiffers as differs:
                if attempt == SENDINGS:
                    raise
                now = sync.checkout_tree(self.checkout)
                compare = True
                if now.key != tree.key:
                    self._note("the checkout changed while it was sent: its present state is sent")
                    tree = now
                    again = self._plan(known, tree)
                    if again.environment != plan.environment:
                        raise
                    plan = replace(again, ca_bundle=plan.ca_bundle)
                    self.connection.change(commands.mkdir(f"{plan.code_folder}.partial", f"{plan.code_folder}.temp"))
                else:
                    self._note(f"{differs.what}: sent again, compared by content")
        self._settled(answer.out, answer.code)
        how = f" by tar ({sent.why})" if sent.why else "" if self.connection.dry_run else f" by {sent.how}"
        words = f"{tree}{how}, verified there" + (f"; {pruned}" if (pruned := _pruned(answer.out)) else "")
        self._changed("sync", words, f"would send {tree}{how}", time.monotonic() - began)
        return plan

    def _settled(self, output: str, code: int) -> None:
        if code == 5 or "lost" in output.splitlines():
            raise lock.lost(self.box.name, lock.owner_of(output.splitlines()))

    def _make_environment(self, plan: DeployPlan, held: lock.Lock) -> None:
        began, output = time.monotonic(), _EnvironmentOutput(self.say, self.now)
        words = [f"arg={name}={value}" for name, value in plan.build]
        argv = [*commands.environment(plan.code_folder, plan.settings(held.token)), *words]
        try:
            answer = self.connection.long_change(argv, output)
        finally:
            self.now("")
        if not self.connection.dry_run:
            if answer.code == 255:
                raise ToolkitError(
                    f"the connection to `{self.box.name}` broke while the environment was made",
                    why=answer.err.strip()[-500:],
                    hint="the same command makes it again, and keeps what is downloaded",
                    exit_code=ExitCode.UNREACHABLE,
                )
            if not output.made:
                refused = output.refused or f"the environment was not made (exit code {answer.code})"
                raise ToolkitError(
                    f"`{self.box.name}`: {refused}",
                    why="\n".join(output.why) or answer.err.strip()[-1000:],
                    hint=output.hint or "the same command makes it again",
                    exit_code=ExitCode.UNFIT if output.refused else ExitCode.INTERNAL,
                )
        for note in output.notes:
            self._note(note)
        what = plan.image or f"a virtual environment, {plan.environment}"
        self._changed("environment", f"{what}: made", f"would make {what}", time.monotonic() - began)


class _EnvironmentOutput:
    """Shows environment.sh's lines as they come, and keeps what follows from them."""

    def __init__(self, say: Say, now: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._now, self._clock = say, now, clock
        self._began, self._progress = 0.0, ""  # of the stage
        self.made, self.refused, self.hint = False, "", ""
        self.why: list[str] = []
        self.notes: list[str] = []
        self.stage = ""

    def __call__(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word == "begin":
            self.stage, self._began, self._progress = one_line(rest), self._clock(), ""
            self._say(f"environment: {self.stage} ...")
        elif word == "now" and rest.strip():
            self._progress = _progress(one_line(rest))
            self._show()
        elif word == "beat":  # each second: pip may be silent for minutes
            self._show()
        elif word == "done":
            seconds, _, what = rest.partition(" ")
            self._now("")
            self._say(f"environment: {one_line(what)}: done ({duration(seconds)})")
        elif word == "note":
            self.notes.append(one_line(rest))
        elif word == "made":
            self.made = True
        elif word == "refused":
            self.refused = one_line(rest)
        elif word == "why":
            self.why.append(rest)
        elif word == "hint":
            self.hint = one_line(rest)

    def _show(self) -> None:
        self._now(waiting(self.stage, self._clock() - self._began, self._progress))


def _progress(line: str) -> str:
    """Return what pip says of a download, `Progress 1000000 of 2000000`, in readable units."""
    found = re.fullmatch(r"Progress (\d+) of (\d+)", line)
    return f"{size(int(found[1]))} of {size(int(found[2]))}" if found and int(found[2]) else line


def _lacking(plan: DeployPlan, contents: BoxContents) -> str:
    lacks = [] if contents.code else ["code"]
    lacks += [] if _has_environment(plan, contents) else ["environment"]
    if lacks:
        return f"{' and '.join(lacks)} missing"
    before = dict(line.partition(" ")[::2] for line in contents.deployed)
    now = dict(line.partition(" ")[::2] for line in plan.lines())
    others = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return f"changed: {', '.join(others)}"


def _pruned(output: str) -> str:
    gone = [line.removeprefix("pruned ").split()[0] for line in output.splitlines() if line.startswith("pruned ")]
    return ", ".join(f"{gone.count(what)} old {what} removed" for what in dict.fromkeys(gone))


def _settled_words(output: str) -> str:
    return "recorded what is deployed" + (f"; {pruned}" if (pruned := _pruned(output)) else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
