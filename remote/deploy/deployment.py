"""Code and environment onto a box, ready to run: probe, sync, environment, self-check; each said
with the time it took.

What is there is asked first, in one round trip (land.sh): where all is as it should be, that is the
end. Else the lock is taken, what lacks is sent or made beside its place, and `deployed`, which
names the whole, is written last. Killed at any moment, what was there before holds.
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

from env.settings import Limits, Provider
from jobs.errors import ExitCode, ToolkitError
from jobs.formatting import duration, one_line, size
from remote.deploy import lock, sync
from remote.deploy.sync import KEY_DIGITS, Tree
from remote.scripts import script
from remote.ssh import commands
from remote.survey.doctor import diagnose, peer_access_off
from remote.survey.facts import BoxFacts, Python, home_path, place_of, provider_of, route_of, runtime_of
from remote.survey.probe_cache import CachedProbe, arguments, hub_mirror, probe, recall, remember

if TYPE_CHECKING:
    from remote.inventory import Box
    from remote.ssh.connection import BoxConnection

Say = Callable[[str], None]
Name = Literal["probe", "look", "lock", "sync", "environment", "settle"]

# What an environment is made of; a change of any of it is another environment.
BARE_FILES = ("env/pins/pip.txt", "env/pins/image.txt", "env/torch_wheel.sh", "remote/on_box/environment.sh")
IMAGE_FILES = (
    *("docker/Dockerfile", "docker/install.sh", "docker/check_image.py", "docker/entrypoint", "docker/compose.cpu.yml"),
    *("env/pins/pip.txt", "env/pins/image.txt", "env/torch_wheel.sh", "env/cuda.sh"),
)
SENDINGS = 3  # of a checkout that changes while it is sent


@dataclass(frozen=True)
class DeployAction:
    """One thing that was done, or with --dry-run would be."""

    name: Name
    said: str
    seconds: float


@dataclass(frozen=True)
class DeployPlan:
    """What is to be on the box, from its facts and this checkout."""

    root: str
    code: str
    runtime: Literal["docker", "bare"]
    environment: str  # its key
    torch: str  # a file of env/pins
    device: Literal["cuda", "cpu"]
    route: str
    mirror: str
    p2p_off: str  # why NCCL_P2P_DISABLE=1; "" if it is not
    python: str = ""  # bare: the interpreter that makes the environment
    maker: str = ""  # bare: what makes an interpreter first
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
        """Of ROOT/deployed, but for the time."""
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
            "torch": self.torch,
            "ca_bundle": self.ca_bundle,
        }
        files = [f"env_file {file}" for file in self.env_files] + [f"proxy_file {file}" for file in self.proxy_files]
        return [*(f"{key} {value}" for key, value in words.items() if value), *files]

    def settings(self, token: str) -> dict[str, str]:
        """For remote/on_box/environment.sh."""
        proxy = self.proxy_files[0] if self.route == "proxy" and self.proxy_files else ""
        words = {
            "root": self.root,
            "token": token,
            "key": self.environment,
            "runtime": self.runtime,
            "torch": self.torch,
            "mirror": self.mirror,
        }
        words |= {
            "device": self.device,
            "python": self.python,
            "maker": self.maker,
            "proxy": proxy,
            "ca_bundle": self.ca_bundle,
        }
        return {key: value for key, value in words.items() if value}


@dataclass(frozen=True)
class BoxContents:
    """land.sh's look: what is on the box."""

    root: Literal["ours", "none", "strange", "unknown"] = "unknown"
    identity: str = ""
    clock: int = 0
    free_kb: int | None = None
    tools: frozenset[str] = frozenset()
    code: bool = False  # the code that is asked for is whole
    environment: bool = False
    image: bool = False
    like: str = ""  # the code that was deployed last
    deployed: tuple[str, ...] = ()  # its lines, but for the time
    time: int = 0
    slot: str = ""  # the run that is in it
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
        lines = dict(
            line.partition(" ")[::2] for line in self.plan.lines() if not line.startswith(("env_file", "proxy_file"))
        )
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
    fresh: bool = False,
    rsync: str = "rsync",
) -> DeployResult:
    """The checkout on the box, and an environment for it. Nothing is done if it is there.

    say: gets each line that stays, a stage's begin and end, and notes. now: gets what is only of
    the moment, such as pip's last line, each in place of the one before, and "" when it is over.
    fresh: the probe is asked even if the box is known. rsync: the local program, "" for none.
    Raises ToolkitError: UNFIT, if deploy itself cannot work there; BUSY; UNREACHABLE; what git or
    the disk here says.
    """
    return _Deploy(connection, checkout, box, limits, providers, state, say, now, why, rsync).run(fresh)


# --- plan: pure -----------------------------------------------------------------------------------


def plan_for(known: CachedProbe, box: Box, limits: Limits, provider: Provider, checkout: Path, code: str) -> DeployPlan:
    """Raises ToolkitError: UNFIT, with what deploy needs and the box has not."""
    facts = known.facts
    root = place_of(facts, provider, box.data_folder).root
    runtime = _runtime(facts, box)
    device: Literal["cuda", "cpu"] = "cpu" if facts.cards == () else "cuda"
    torch = box.build.get("TORCH") or ("torch-cu118" if device == "cuda" else "torch-cpu")
    route = route_of(facts, limits, "mirror" if box.mirror not in ("", "default") else "")
    mirror = box.mirror or (hub_mirror(box) if route and route.name == "mirror" else provider.mirror)
    build: dict[str, str] = {key: value for key, value in box.build.items() if key not in ("CA_BUNDLE", "TORCH")}
    if device == "cpu":
        build = {"CUDA_ARCHS": "", **build}
    python, maker = ("", "") if runtime == "docker" else _python(facts, limits)
    notes = [] if route else ["no way to the model hub was found: models and data have to come from here"]
    if why := peer_access_off(facts, limits):
        notes.append(f"cards will not copy to each other directly (NCCL_P2P_DISABLE=1): {why}")
    return DeployPlan(
        root=root,
        code=code,
        runtime=runtime,
        environment=environment_key(checkout, runtime, torch, mirror, build, device),
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
    checkout: Path, runtime: str, torch: str, mirror: str, build: Mapping[str, str], device: str
) -> str:
    """Names what an environment is made of, whatever this box has; where packages come from does
    not change them, only the image's settings.
    """
    files = [
        f"env/pins/{torch}.txt",
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


def _python(facts: BoxFacts, limits: Limits) -> tuple[str, str]:
    """-> (a Python of the right version, "") or ("", what makes one)."""
    wanted = limits.image.python
    right = [
        python for python in facts.pythons if python.version.split(".")[:2] == wanted.split(".") and python.makes_venv
    ]
    if right:
        return min(right, key=_not_conda).path, ""
    return "", facts.condas[0][0] if facts.condas else ""


def _not_conda(python: Python) -> bool:
    return "conda" in python.path  # one that may be removed with an environment of somebody else's


def check_fit(
    known: CachedProbe, plan: DeployPlan, there: BoxContents, box: Box, limits: Limits, provider: Provider
) -> None:
    """What deploy itself needs; all else is doctor's.

    Raises ToolkitError: UNFIT.
    """
    facts, place = known.facts, place_of(known.facts, provider, box.data_folder)
    name = f"`{box.name}` is not fit to be deployed to"

    def unfit(why: str, hint: str) -> ToolkitError:
        return ToolkitError(name, why=why, hint=hint, exit_code=ExitCode.UNFIT)

    if facts.machine and facts.machine != limits.image.machine:
        raise unfit(
            f"its processor is {facts.machine}",
            f"take a box with {limits.image.machine}: PyTorch {plan.torch} is made for no other",
        )
    if there.root == "strange":
        raise unfit(f"{plan.root} is there, and is not ours", "move it away, or name another data_folder in boxes.yaml")
    if not re.fullmatch(r"/[^\n]*", plan.root):
        raise unfit(f"our folder would be {one_line(plan.root)}", "name an absolute data_folder in boxes.yaml")
    if there.root != "ours":
        if not place.found:
            raise unfit(
                f"{place.root}: no answer from its disk",
                "see that its disk is there, or name another data_folder in boxes.yaml",
            )
        if place.is_folder is False or place.read_only or place.writable is False:
            what = (
                "is no folder"
                if place.is_folder is False
                else "is read-only"
                if place.read_only
                else "cannot be written to"
            )
            raise unfit(f"{place.found} {what}", "name another data_folder in boxes.yaml")
    if not there.tools & {"rsync", "tar"}:
        raise unfit("it has neither rsync nor tar", "apt-get install rsync")
    free = there.free_kb * 1024 if there.free_kb is not None else place.free_bytes
    whole = there.environment if plan.runtime == "bare" else there.image
    needed = limits.disk.bytes_min
    if plan.runtime == "bare" and not whole:
        needed = limits.environment.bytes_cpu if plan.device == "cpu" else limits.environment.bytes_cuda
        if not plan.python and not plan.maker:
            seen = ", ".join(dict.fromkeys(python.version for python in facts.pythons)) or "none"
            wanted = limits.image.python
            raise unfit(
                f"no Python {wanted} with venv, and no conda or uv to make it with (Pythons there: {seen})",
                f"apt-get install python{wanted} python{wanted}-venv, or install miniconda, or take the provider's image that has it",
            )
    if place.free_inodes is not None and place.free_inodes < limits.disk.inodes_min and not (whole and there.code):
        raise unfit(
            f"{place.free_inodes} inodes are free at {plan.root}, and {limits.disk.inodes_min} are needed",
            "remove many small files there, or name another data_folder in boxes.yaml",
        )
    if free is not None and free < needed and not (whole and there.code):
        raise unfit(
            f"{size(free)} are free at {plan.root}, and {size(needed)} are needed",
            "make room there, or name another data_folder in boxes.yaml",
        )


def parse_look(text: str) -> BoxContents:
    """Raises ToolkitError: the answer broke off."""
    said: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        said.setdefault(key, []).append(value)
    if "end" not in said:
        raise ToolkitError(
            "the box's answer broke off", why=one_line(text[-300:]), hint="try again", exit_code=ExitCode.UNREACHABLE
        )

    def one(key: str) -> str:
        return said.get(key, [""])[0]

    def number(key: str) -> int | None:
        return int(one(key)) if one(key).lstrip("-").isdecimal() else None

    lines = said.get("deployed", [])
    times = [line.removeprefix("time ") for line in lines if line.startswith("time ")]
    return BoxContents(
        root={"ours": "ours", "none": "none", "strange": "strange"}.get(one("root"), "unknown"),  # type: ignore[arg-type]
        identity=one("identity"),
        clock=number("clock") or 0,
        free_kb=number("free"),
        tools=frozenset(said.get("tool", [])),
        code="code" in said,
        environment="environment" in said,
        image="image" in said,
        like=one("like"),
        deployed=tuple(line for line in lines if not line.startswith("time ")),
        time=int(times[0]) if times and times[0].isdecimal() else 0,
        slot=one("slot"),
        owner=lock.owner_of(text.splitlines()),
    )


def is_whole(plan: DeployPlan, there: BoxContents) -> bool:
    environment = there.environment if plan.runtime == "bare" else there.image
    return there.root == "ours" and there.code and environment and sorted(there.deployed) == sorted(plan.lines())


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
    rsync: str
    parts: list[DeployAction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # notes: not before it is sure that there is no error instead, such as a deploy of somebody
    # else's
    are_told: bool = False

    def run(self, fresh: bool) -> DeployResult:
        started = time.monotonic()
        tree = sync.checkout_tree(self.checkout)
        for note in (
            sync.check_size(tree),
            *(f"not sent: {name} is a repository of its own" for name in tree.left_out),
        ):
            self._note(note)
        known, plan, there = self._look(tree, fresh)
        changed = not is_whole(plan, there)
        for note in plan.notes:
            self._note(note)
        if changed:
            check_fit(known, plan, there, self.box, self.limits, self._provider(known))
            plan = self._change(tree, known, plan, there)
        self._tell()
        if not self.connection.dry_run:
            remember(self.state, self.box.name, replace(known, identity=there.identity, root=plan.root))
        when = 0 if changed else there.time
        return DeployResult(
            plan,
            known.facts,
            changed,
            when,
            time.monotonic() - started,
            tuple(self.parts),
            tuple(dict.fromkeys(self.notes)),
        )

    def _note(self, note: str) -> None:
        if note and note not in self.notes:
            self.notes.append(note)
            if self.are_told:
                self.say(f"note: {note}")

    def _tell(self) -> None:
        """The notes that are there, and from now on each at once."""
        for note in [] if self.are_told else self.notes:
            self.say(f"note: {note}")
        self.are_told = True

    def _done(self, name: Name, said: str, seconds: float) -> None:
        self.parts.append(DeployAction(name, said, seconds))
        self.say(f"{name}: {said} ({_seconds(seconds)})")

    def _changed(self, name: Name, said: str, would: str, seconds: float) -> None:
        """What was done, or with --dry-run what would be."""
        if not self.connection.dry_run:
            self._done(name, said, seconds)
            return
        self.parts.append(DeployAction(name, would, seconds))
        self.say(f"{name}: {would}")

    def _provider(self, known: CachedProbe) -> Provider:
        return provider_of(known.facts, self.providers, self.box.provider)

    # --- what is there

    def _look(self, tree: Tree, fresh: bool) -> tuple[CachedProbe, DeployPlan, BoxContents]:
        """From what is remembered, if the box is still the same; else the probe is asked."""
        known = None if fresh else recall(self.state, self.box.name)
        if known is not None and known.identity and known.asked == arguments(self.box, self.providers):
            plan, there = self._look_for(tree, known)
            if there.identity == known.identity and there.root != "unknown":
                return known, plan, there
            self.say(f"{self.box.name} was started anew, or is another box: asking again what it is")
        began = time.monotonic()
        known = probe(self.connection, self.box, self.providers)
        provider = self._provider(known)
        self._done(
            "probe",
            f"{provider.title}; {runtime_of(known.facts).name} ({runtime_of(known.facts).why})",
            time.monotonic() - began,
        )
        found = diagnose(
            known.facts, None, self.limits, provider, self.connection.link, data_folder=self.box.data_folder
        )
        for check in found.checks:
            if check.status in ("unfit", "warning"):
                self._note(f"{check.name}: {check}")
        plan, there = self._look_for(tree, known)
        return known, plan, there

    def _look_for(self, tree: Tree, known: CachedProbe) -> tuple[DeployPlan, BoxContents]:
        began = time.monotonic()
        plan = plan_for(known, self.box, self.limits, self._provider(known), self.checkout, tree.key)
        if bundle := self._bundle():
            plan = replace(plan, ca_bundle=f"{plan.root}/inputs/{bundle.key}/{bundle.files[0].name}")
        environment, image = (plan.environment, "-") if plan.runtime == "bare" else ("-", plan.image)
        answer = self.connection.query(
            commands.sh_script("look", plan.root, tree.key, environment, image), stdin=script("land.sh")
        )
        there = parse_look(answer.out)
        whole = is_whole(plan, there)
        self._done("look", "already up to date" if whole else _lacking(plan, there), time.monotonic() - began)
        return plan, there

    def _bundle(self) -> Tree | None:
        """The certificates of boxes.yaml's build.CA_BUNDLE, which travel as a file."""
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

    def _change(self, tree: Tree, known: CachedProbe, plan: DeployPlan, there: BoxContents) -> DeployPlan:
        began = time.monotonic()
        held = lock.take(
            self.connection,
            plan.root,
            tree.key,
            why=self.why,
            laptop=lock.laptop_id(self.state),
            seen=there.owner,
            size_bytes=0 if there.code else tree.size_bytes,
        )
        if held.took_over:
            self._note(f"the lock was taken over from {held.took_over}")
        said = "taken" + (f" over from {held.took_over}" if held.took_over else "")
        self._changed(
            "lock",
            said,
            "would be taken" + (f"; now it is held by {there.owner}" if there.owner else ""),
            time.monotonic() - began,
        )
        self._tell()
        settled = False
        try:
            settled, plan = self._locked(tree, known, plan, there, held)
        finally:
            if not settled:
                # If the connection is dead: the next deploy from this laptop knows that this one is
                # gone, another one waits until it expires.
                with suppress(ToolkitError):
                    lock.release(self.connection, held)
        return plan

    def _locked(
        self, tree: Tree, known: CachedProbe, plan: DeployPlan, there: BoxContents, held: lock.Lock
    ) -> tuple[bool, DeployPlan]:
        whole = there.environment if plan.runtime == "bare" else there.image
        settled = False
        if (bundle := self._bundle()) and f"ca_bundle {plan.ca_bundle}" not in there.deployed:
            sync.send_whole(
                self.connection,
                bundle,
                str(PurePosixPath(plan.ca_bundle).parent),
                rsync_there="rsync" in there.tools,
                rsync=self.rsync,
            )
        if not there.code:
            plan = self._send(tree, known, plan, there, held, plan.lines() if whole else [])
            settled = whole
        if not whole:
            self._make_environment(plan, held)
        if not settled:
            began = time.monotonic()
            argv = commands.sh_script("settle", plan.root, held.token, *plan.lines())
            answer = self.connection.change(argv, stdin=script("land.sh"), timeout_s=600.0, check=False)
            self._settled(answer.out, answer.code)
            if answer.code:
                raise lock.refused(self.box.name, "write what is deployed", answer)
            self._changed(
                "settle", _settled_words(answer.out), "would write down what is deployed", time.monotonic() - began
            )
        return True, plan

    def _send(
        self,
        tree: Tree,
        known: CachedProbe,
        plan: DeployPlan,
        there: BoxContents,
        held: lock.Lock,
        lines: Sequence[str],
    ) -> DeployPlan:
        """The code, verified there; with `lines` it is also what is deployed then. -> the plan, for
        what the checkout was when it was sent.
        """
        began, compare = time.monotonic(), False
        like = f"{plan.root}/code/{there.like}" if there.like else ""
        for attempt in range(1, SENDINGS + 1):
            self.now("" if self.connection.dry_run else f"sync: {tree} ...")
            try:
                sent = sync.send(
                    self.connection, tree, plan.code_folder, like=like, rsync_there="rsync" in there.tools, rsync=self.rsync, compare=compare
                )  # fmt: skip
                answer = sync.land(
                    self.connection, tree, plan.code_folder, plan.root, held.token, *(plan.lines() if lines else [])
                )
                break
            except sync.UploadDiffers as differs:
                if attempt == SENDINGS:
                    raise
                now = sync.checkout_tree(self.checkout)
                compare = True
                if now.key != tree.key:
                    self._note("the checkout changed while it was sent: what it is now is sent")
                    tree = now
                    again = plan_for(known, self.box, self.limits, self._provider(known), self.checkout, tree.key)
                    if again.environment != plan.environment:
                        raise
                    plan = replace(again, ca_bundle=plan.ca_bundle)
                    self.connection.change(commands.mkdir(f"{plan.code_folder}.partial", f"{plan.code_folder}.temp"))
                else:
                    self._note(f"{differs.what}: sent again, compared by content")
            finally:
                self.now("")
        self._settled(answer.out, answer.code)
        how = f" by tar ({sent.why})" if sent.why else "" if self.connection.dry_run else f" by {sent.how}"
        words = f"{tree}{how}, verified there" + (f"; {pruned}" if (pruned := _pruned(answer.out)) else "")
        self._changed("sync", words, f"would send {tree}{how}", time.monotonic() - began)
        return plan

    def _settled(self, said: str, code: int) -> None:
        if code == 5 or "lost" in said.splitlines():
            raise lock.lost(self.box.name, lock.owner_of(said.splitlines()))

    def _make_environment(self, plan: DeployPlan, held: lock.Lock) -> None:
        began, said = time.monotonic(), _EnvironmentSaid(self.say, self.now)
        words = [f"arg={name}={value}" for name, value in plan.build]
        argv = [*commands.environment(plan.code_folder, plan.settings(held.token)), *words]
        try:
            answer = self.connection.local(
                self.connection.stream(argv), changes=True, timeout_s=None, check=False, heard=said
            )
        finally:
            self.now("")
        if not self.connection.dry_run:
            if answer.code == 255:
                raise ToolkitError(
                    f"the connection to `{self.box.name}` broke while the environment was made",
                    why=answer.err.strip()[-500:],
                    hint="the same command makes it, from what is downloaded already",
                    exit_code=ExitCode.UNREACHABLE,
                )
            if not said.made:
                raise ToolkitError(
                    f"`{self.box.name}`: {said.refused or f'the environment was not made (exit code {answer.code})'}",
                    why="\n".join(said.why) or answer.err.strip()[-1000:],
                    hint=said.hint or "the same command makes it anew",
                    exit_code=ExitCode.UNFIT if said.refused else ExitCode.INTERNAL,
                )
        for note in said.notes:
            self._note(note)
        what = plan.image or f"a virtual environment, {plan.environment}"
        self._changed("environment", f"{what}: made", f"would make {what}", time.monotonic() - began)


class _EnvironmentSaid:
    """environment.sh's lines, as they come."""

    def __init__(self, say: Say, now: Say) -> None:
        self._say, self._now = say, now
        self.made, self.refused, self.hint = False, "", ""
        self.why: list[str] = []
        self.notes: list[str] = []
        self.stage = ""

    def __call__(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word == "begin":
            self.stage = one_line(rest)
            self._say(f"environment: {self.stage} ...")
        elif word == "now" and rest.strip():
            self._now(f"{self.stage}: {one_line(rest)}")
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


def _lacking(plan: DeployPlan, there: BoxContents) -> str:
    whole = there.environment if plan.runtime == "bare" else there.image
    lacks = [*(["code"] if not there.code else []), *(["environment"] if not whole else [])]
    if lacks:
        return f"{' and '.join(lacks)} to be {'sent' if lacks == ['code'] else 'made'}"
    before = dict(line.partition(" ")[::2] for line in there.deployed)
    now = dict(line.partition(" ")[::2] for line in plan.lines())
    others = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return f"changed: {', '.join(others)}"


def _pruned(said: str) -> str:
    gone = [line.removeprefix("pruned ").split()[0] for line in said.splitlines() if line.startswith("pruned ")]
    return ", ".join(f"{gone.count(what)} old {what} removed" for what in dict.fromkeys(gone))


def _settled_words(said: str) -> str:
    return "what is deployed is written down" + (f"; {pruned}" if (pruned := _pruned(said)) else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
