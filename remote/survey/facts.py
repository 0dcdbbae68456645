"""The answer of probe.sh as typed values, and what follows: provider, folder, runtime, hub, clock.

All functions are pure. A torn line, or a line of an unknown kind, is ignored. A value that the
answer does not give is None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, cast, get_args

from env.settings import OUR_FOLDER, Limits, Provider
from jobs.fitness import Holder

PROBE_S = 6.0  # the longest that the probe takes on the box
# A few hundred bytes that every mirror has, and that a job needs anyway.
SMALL_FILE = "facebook/opt-125m/resolve/main/config.json"
Way = Literal["direct", "mirror", "proxy"]
UNLIMITED = 2**60  # in cgroups of version 1, a number near 2^63 means no limit


# --- what is sent ---------------------------------------------------------------------------------


def probe_args(
    providers: Mapping[str, Provider], *, data_folder: str = "", hub: str = "https://huggingface.co", mirror: str = ""
) -> list[str]:
    """Return the arguments of probe.sh.

    data_folder: the one that boxes.yaml names, if any. hub, mirror: addresses; an empty one is not
    tried.
    """
    known = providers.values()
    folders = [data_folder] if data_folder else [folder for each in known for folder in each.data_folders]
    wanted = {
        "root": [_root(folder) for folder in folders],
        "file": [file for each in known for file in each.signs.files]
        + [file for each in known for file in (*each.env_files, *each.proxy_files)],
        "python": [path for each in known for path in each.pythons],
        "conda": [path for each in known for path in each.condas],
        "proxy": [path for each in known for path in each.proxy_files],
        "direct": [f"{hub.rstrip('/')}/{SMALL_FILE}"] if hub else [],
        "mirror": [f"{mirror.rstrip('/')}/{SMALL_FILE}"] if mirror else [],
    }
    return [f"{key}={value}" for key, values in wanted.items() for value in dict.fromkeys(values)]


def _root(data_folder: str) -> str:
    return f"{data_folder.rstrip('/')}/{OUR_FOLDER}"


# --- what comes back ------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuCard:
    index: int
    uuid: str = ""
    bus: str = ""  # 00000000:65:00.0
    name: str = ""
    total_bytes: int | None = None
    used_bytes: int | None = None
    utilisation: int | None = None  # percent
    capability: str | None = None  # compute capability
    ecc_now: int | None = None  # uncorrected errors since the driver was loaded; None: no ECC, or not said
    ecc_ever: int | None = None
    xids: tuple[int, ...] = ()  # numbers in the kernel's log, without repeats


@dataclass(frozen=True)
class Peer:
    """One copy from GPU to GPU, which was compared."""

    source: int
    target: int
    access: bool | None  # the driver offers peer access
    result: str  # right, wrong, or what failed


@dataclass(frozen=True)
class Docker:
    client: str = ""  # its version; "" if there is none
    server: str = ""  # the daemon's version; "" if it does not answer
    error: str = ""  # why the daemon does not answer
    compose: str = ""
    buildx: str = ""
    runtimes: tuple[str, ...] = ()
    gpu_code: int | None = None  # exit code of a container with GPUs; None: not tried
    gpu_cards: int | None = None  # that the container saw
    gpu_image: str = ""
    gpu_said: str = ""  # the container's first line, or why nothing was tried


@dataclass(frozen=True)
class Place:
    """The place of our folder on the box, whether it exists or not."""

    root: str
    found: str = ""  # our folder, or its nearest parent that exists
    missing: str = ""  # the first folder to be made
    is_folder: bool | None = None
    writable: bool | None = None
    uid: int | None = None
    free_bytes: int | None = None
    free_inodes: int | None = None
    file_system: str = ""
    read_only: bool | None = None
    marked: bool = False  # our marker is in it
    deployed: Mapping[str, str] | None = None  # the lines of ROOT/deployed
    slot: Mapping[str, str] | None = None  # the files of ROOT/slot: run, request, pid, start, boot
    slot_alive: bool = False  # its supervisor runs


@dataclass(frozen=True)
class Python:
    path: str
    version: str  # 3.10.13
    makes_venv: bool


@dataclass(frozen=True)
class HubRoute:
    """A way to the model hub, measured with a small file. Only one way is ever used."""

    name: Way
    status: int | None = None  # HTTP
    connect_s: float | None = None
    total_s: float | None = None
    error: str = ""

    @property
    def works(self) -> bool:
        return self.status in (200, 206) and self.total_s is not None


@dataclass(frozen=True)
class BoxFacts:
    complete: bool = False  # the probe came to its end
    elapsed_s: float | None = None  # how long it took on the box
    late: tuple[str, ...] = ()  # parts that were killed at their time limit
    clock: float | None = None  # the box's time when the probe began
    hostname: str = ""
    boot: str = ""
    kernel: str = ""
    machine: str = ""  # x86_64
    user: str = ""
    uid: int | None = None
    gid: int | None = None
    home: str = ""
    variables: frozenset[str] = frozenset()  # names of environment variables, of process 1 and of our shell
    files: frozenset[str] = frozenset()  # those of the files asked for that exist
    container: bool = False
    hypervisor: bool = False
    driver: str | None = None
    cards: tuple[GpuCard, ...] | None = None  # None: not known; (): none
    smi_error: str = ""
    holders: tuple[Holder, ...] = ()
    kernel_log: bool = False  # whether it can be read
    topology: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    peers_said: str = ""  # why the copies were not tried
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    home_free_bytes: int | None = None
    cores: float | None = None
    memory_bytes: int | None = None
    memory_free_bytes: int | None = None
    cpu_flags: tuple[str, ...] | None = None
    places: tuple[Place, ...] = ()
    pythons: tuple[Python, ...] = ()
    condas: tuple[tuple[str, str], ...] = ()  # (path, version), best first; conda, mamba, micromamba or uv
    tools: Mapping[str, str] | None = None  # name -> path
    rsync: str = ""  # version
    gnu_tar: bool | None = None
    docker: Docker = Docker()
    routes: tuple[HubRoute, ...] = ()


class _Answer:
    """The lines of the probe's answer, by key."""

    def __init__(self, text: str) -> None:
        self.values: dict[str, list[str]] = {}
        *lines, _torn = text.split("\n")  # the text after the last newline is torn, or empty
        for line in lines:
            key, tab, value = line.partition("\t")
            if tab and value:
                self.values.setdefault(key, []).append(value)

    def all_values(self, key: str) -> list[str]:
        return self.values.get(key, [])

    def value(self, key: str) -> str:
        return self.all_values(key)[0] if key in self.values else ""

    def rows(self, key: str, fields: int) -> Iterator[list[str]]:
        """Yield the values of a key that have so many fields; only the last may hold a bar."""
        for value in self.all_values(key):
            parts = [part.strip() for part in value.split("|", fields - 1)]
            if len(parts) == fields:
                yield parts

    def row(self, key: str, fields: int, first: str) -> list[str] | None:
        return next((parts for parts in self.rows(key, fields) if parts[0] == first), None)


def parse(text: str | bytes) -> BoxFacts:
    answer = _Answer(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)
    cards = _cards(answer)
    limit, used = _memory(answer)
    shm, home = _df(answer.value("shm")), _df(answer.value("home_disk"))
    elapsed_ms, clock = _int(answer.value("end")), _float(answer.value("clock"))
    return BoxFacts(
        complete=elapsed_ms is not None,
        elapsed_s=None if elapsed_ms is None else elapsed_ms / 1000,
        late=tuple(answer.all_values("late")),
        clock=clock,
        hostname=answer.value("hostname"),
        boot=answer.value("boot"),
        kernel=answer.value("kernel"),
        machine=answer.value("machine"),
        user=answer.value("user"),
        uid=_int(answer.value("uid")),
        gid=_int(answer.value("gid")),
        home=answer.value("home"),
        variables=frozenset(answer.all_values("environ")),
        files=frozenset(answer.all_values("file")),
        container=bool(answer.all_values("container")) or answer.value("root_file_system") == "overlay",
        hypervisor=answer.value("hypervisor") == "1",
        driver=_driver(answer),
        cards=cards,
        smi_error=next((parts[1] for parts in answer.rows("smi_error", 2) if parts[0] == "gpu"), ""),
        holders=_holders(answer, cards or ()),
        kernel_log=answer.value("kernel_log") == "1",
        topology=tuple(answer.all_values("topology")),
        peers=tuple(_peers(answer)),
        peers_said=answer.value("peers"),
        shm_bytes=shm[0],
        shm_free_bytes=shm[1],
        home_free_bytes=home[1],
        cores=_cores(answer),
        memory_bytes=limit,
        memory_free_bytes=None if limit is None or used is None else max(0, limit - used),
        cpu_flags=tuple(answer.value("cpu_flags").split()) or None,
        places=tuple(_place(answer, index, root) for index, root in answer.rows("root", 2)),
        pythons=tuple(
            dict.fromkeys(
                Python(path, version, makes_venv == "1")
                for version, makes_venv, path in answer.rows("python", 3)
                if _is_version(version)
            )
        ),
        condas=tuple(sorted({(path, version) for version, path in answer.rows("conda", 2)}, key=_conda_order)),
        tools=dict(answer.rows("tool", 2)),
        rsync=_version_in(answer.value("rsync")),
        gnu_tar="GNU tar" in answer.value("tar") if answer.value("tar") else None,
        docker=_docker(answer),
        routes=tuple(_routes(answer)),
    )


def _int(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"-?[0-9]{1,20}", text.strip()) else None


def _float(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"[0-9]{1,20}(\.[0-9]+)?", text.strip()) else None


def _is_version(text: str) -> bool:
    return re.fullmatch(r"[0-9]+(\.[0-9]+)+", text) is not None


def _version_in(text: str) -> str:
    found = re.search(r"[0-9]+(\.[0-9]+)+", text)
    return found[0] if found else ""


def _mebibytes(text: str) -> int | None:
    number = _int(text)
    return None if number is None else number * 2**20


def _driver(answer: _Answer) -> str | None:
    versions = [row[6] for row in answer.rows("gpu", 8)] + re.findall(
        r"\s([0-9]+(?:\.[0-9]+)+)\s", answer.value("nvrm")
    )
    return next(filter(_is_version, versions), None)


def _cards(answer: _Answer) -> tuple[GpuCard, ...] | None:
    rows = [row for row in answer.rows("gpu", 8) if _int(row[0]) is not None]
    if not rows:
        # (): nothing of NVIDIA is on the box. None: something is there but reports no GPU, so it
        # hangs or is broken.
        nothing = not (answer.all_values("card_file") or answer.value("nvrm") or answer.all_values("smi_error"))
        smi_is_here = any(name == "nvidia-smi" for name, _ in answer.rows("tool", 2))
        return () if answer.value("probe") and nothing and (not smi_is_here or answer.value("gpus_asked")) else None
    xids = _xids(answer)
    cards = []
    for index, uuid, bus, total, used, busy, _, name in rows:
        capability, ecc = answer.row("capability", 3, index), answer.row("ecc", 3, index)
        cards.append(
            GpuCard(
                index=int(index),
                uuid=uuid,
                bus=bus,
                name=name,
                total_bytes=_mebibytes(total),
                used_bytes=_mebibytes(used),
                utilisation=_int(busy),
                capability=capability[2] if capability and _is_version(capability[2]) else None,
                ecc_now=_int(ecc[1]) if ecc else None,
                ecc_ever=_int(ecc[2]) if ecc else None,
                xids=tuple(dict.fromkeys(number for where, number in xids if where == _bus(bus))),
            )
        )
    return tuple(cards)


def _bus(text: str) -> str:
    """Shorten a bus address: `00000000:65:00.0` and `0000:65:00` become `65:00`.

    A domain other than 0 is kept, since a host's log also names GPUs of other people.
    """
    domain, _, rest = text.lower().partition(":")
    rest = rest.partition(".")[0]
    return rest if not domain.strip("0") else f"{domain.lstrip('0')}:{rest}"


def _xids(answer: _Answer) -> list[tuple[str, int]]:
    found = (re.search(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): ([0-9]+)", line) for line in answer.all_values("xid"))
    return [(_bus(each[1]), int(each[2])) for each in found if each]


def _holders(answer: _Answer, cards: Iterable[GpuCard]) -> tuple[Holder, ...]:
    indexes = {card.uuid: card.index for card in cards}
    listed = [
        Holder(indexes.get(uuid), int(pid), _mebibytes(used), command)
        for uuid, pid, used, command in answer.rows("holder", 4)
        if pid.isdecimal()
    ]
    known = {holder.pid for holder in listed}
    others = [Holder(None, int(pid), None, command) for pid, command in answer.rows("opener", 2) if pid.isdecimal()]
    return (*listed, *(holder for holder in others if holder.pid not in known))


def _peers(answer: _Answer) -> Iterator[Peer]:
    for source, target, access, result in answer.rows("peer", 4):
        if source.isdecimal() and target.isdecimal() and result:
            yield Peer(int(source), int(target), {"1": True, "0": False}.get(access), result)


def _df(line: str) -> tuple[int | None, int | None]:
    """Parse `/dev/vda 1000 400 600 40% /data` of `df -P -k` into (bytes in all, bytes free).

    The device's name may hold blanks.
    """
    total, free = _df_numbers(line)
    return (None if total is None else total * 1024, None if free is None else free * 1024)


def _df_numbers(line: str) -> tuple[int | None, int | None]:
    found = re.search(r"\s([0-9]+)\s+([0-9]+)\s+(-?[0-9]+)\s+([0-9]+%|-)\s+/", line)
    return (int(found[1]), max(0, int(found[3]))) if found else (None, None)


def _cores(answer: _Answer) -> float | None:
    """Return how many cores the cgroup gives time for, at most those that we may run on."""
    quotas = [_float(answer.value("cores"))]
    for value in answer.all_values("cpu_max"):
        quota, _, period = value.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            quotas.append(int(quota) / int(period))
    return min((each for each in quotas if each), default=None)


def _memory(answer: _Answer) -> tuple[int | None, int | None]:
    """Return (bytes that this box may use, bytes in use).

    The machine and each cgroup set a limit; the one that leaves the least memory free counts.
    """
    total, available = _int(answer.value("MemTotal")), _int(answer.value("MemAvailable"))
    bounds = [(total * 1024, (total - (available if available is not None else total)) * 1024)] if total else []
    for limit, used, cached in answer.rows("memory_max", 3):
        if limit.isdecimal() and used.isdecimal() and int(limit) < UNLIMITED:
            bounds.append((int(limit), max(0, int(used) - (_int(cached) or 0))))
    return min(bounds, key=lambda bound: bound[0] - bound[1], default=(None, None))


def _place(answer: _Answer, index: str, root: str) -> Place:
    at, missing, mount = answer.row("place", 5, index), answer.row("missing", 2, index), answer.row("mount", 3, index)
    disk, inodes = answer.row("disk", 2, index), answer.row("inodes", 2, index)
    lines = [line.partition(" ") for place, line in answer.rows("deployed", 2) if place == index]
    slot = {name: value for place, name, value in answer.rows("slot", 3) if place == index}
    return Place(
        root=root,
        found=at[4] if at else "",
        missing=missing[1] if missing else "",
        is_folder=at[2] == "1" if at else None,
        writable=at[1] == "1" if at else None,
        uid=_int(at[3]) if at else None,
        free_bytes=_df(disk[1])[1] if disk else None,
        free_inodes=_free_inodes(inodes[1]) if inodes else None,
        file_system=mount[1] if mount else "",
        read_only="ro" in mount[2].split(",") if mount else None,
        marked=index in answer.all_values("marker"),
        deployed={key: value for key, _, value in lines if key} if lines else None,
        slot=slot or None,
        slot_alive=index in answer.all_values("slot_alive"),
    )


def _free_inodes(line: str) -> int | None:
    total, free = _df_numbers(line)
    return free if total else None  # Btrfs and others have no such number


def _conda_order(conda: tuple[str, str]) -> tuple[int, str]:
    name = PurePosixPath(conda[0]).name
    known = ("conda", "mamba", "micromamba", "uv")
    return (known.index(name) if name in known else len(known), conda[0])


def _docker(answer: _Answer) -> Docker:
    daemon = next(answer.rows("docker_daemon", 4), None)
    tried = next(answer.rows("docker_gpu", 4), None)
    return Docker(
        client=_version_in(answer.value("docker")),
        server=daemon[0] if daemon else "",
        error="" if daemon else answer.value("docker_error"),
        compose=_version_in(answer.value("docker_compose")),
        buildx=_version_in(answer.value("docker_buildx")),
        runtimes=tuple(daemon[2].split()) if daemon else (),
        gpu_code=_int(tried[0]) if tried else None,
        gpu_cards=_int(tried[1]) if tried else None,
        gpu_image=tried[2] if tried else "",
        gpu_said=tried[3] if tried else answer.value("docker_gpu"),
    )


def _routes(answer: _Answer) -> Iterator[HubRoute]:
    for name, status, connect, total, _size, error in answer.rows("hub", 6):
        if name in get_args(Way):
            yield HubRoute(cast(Way, name), _int(status) or None, _float(connect), _float(total), error)


# --- what follows ---------------------------------------------------------------------------------


def provider_of(facts: BoxFacts | None, providers: Mapping[str, Provider], chosen: str = "") -> Provider:
    """Return the provider that boxes.yaml names; else the one whose signs are found; else generic.

    Some providers share files, so the name of a host or a variable counts more than a file.
    """
    if chosen in providers:
        return providers[chosen]
    for is_sign in (_by_name, _by_file):
        for provider in providers.values():
            if facts is not None and is_sign(provider, facts):
                return provider
    return providers["generic"]


def _by_name(provider: Provider, facts: BoxFacts) -> bool:
    hostname = any(re.fullmatch(pattern, facts.hostname) for pattern in provider.signs.hostnames)
    return hostname or any(facts.variables.issuperset(group) for group in provider.signs.variables)


def _by_file(provider: Provider, facts: BoxFacts) -> bool:
    return any(file in facts.files for file in provider.signs.files)


def home_path(path: str, facts: BoxFacts) -> str:
    """Replace `$HOME` in a provider's path by the home folder on the box."""
    if path == "$HOME" or path.startswith("$HOME/"):
        return f"{facts.home or '/root'}{path.removeprefix('$HOME')}"
    return path


def place_of(facts: BoxFacts, provider: Provider, data_folder: str = "") -> Place:
    """Return the place of our folder on the box.

    It is in the folder that boxes.yaml names; else in the first folder of the provider that exists;
    else in the home folder.
    """
    wanted = [home_path(folder, facts) for folder in ((data_folder,) if data_folder else provider.data_folders)]
    known = {place.root: place for place in facts.places}
    places = [known.get(_root(folder), Place(_root(folder))) for folder in wanted]
    existing = [
        place
        for place, folder in zip(places, wanted, strict=True)
        if place.found in (folder.rstrip("/") or "/", place.root)
    ]
    home = _root(home_path("$HOME", facts))
    if existing or data_folder:
        return (existing or places)[0]
    return known.get(home, Place(home))


@dataclass(frozen=True)
class Runtime:
    name: Literal["docker", "bare"]
    why: str
    lacking: str = ""  # if Docker is there but cannot be used: the part that is missing


def runtime_of(facts: BoxFacts) -> Runtime:
    """Choose the runtime: Docker, if all of it works and it reaches the GPUs, if there are any."""
    docker = facts.docker
    if not docker.client and not docker.server:
        return Runtime("bare", "no Docker")
    if not docker.server:
        return Runtime("bare", "Docker's daemon does not answer", "daemon")
    if not docker.compose:
        return Runtime("bare", "Docker has no Compose", "compose")
    if facts.cards != () and not reaches_gpus(docker):
        return Runtime("bare", "Docker does not reach the GPUs", "gpu")
    return Runtime("docker", f"Docker {docker.server}, Compose {docker.compose}")


def reaches_gpus(docker: Docker) -> bool:
    """Tell whether a container with GPUs sees them.

    If no container could tell (no image, or one without nvidia-smi: 126, 127), it is enough that
    NVIDIA's runtime is listed.
    """
    if docker.gpu_code in (None, 126, 127):
        return "nvidia" in docker.runtimes
    return docker.gpu_code == 0 and bool(docker.gpu_cards)


def route_of(facts: BoxFacts, limits: Limits, prefer: str = "") -> HubRoute | None:
    """Choose the one way to the hub.

    The preferred one if it works at all, else the direct one if it is quick enough, else the
    quickest.
    """
    working = [route for route in facts.routes if route.works]
    chosen = [route for route in working if route.name == prefer]
    direct = [route for route in working if route.name == "direct"]
    direct = [route for route in direct if (route.total_s or 0) <= limits.hub.small_file_max_s]
    quickest = sorted(working, key=lambda route: route.total_s or 0)
    return next(iter([*chosen, *direct, *quickest]), None)


@dataclass(frozen=True)
class ClockOffset:
    seconds: float  # how far the box's clock is ahead
    within_s: float  # how exact that is, which depends on the round trip


def clock_offset(facts: BoxFacts, sent: float, received: float) -> ClockOffset | None:
    """Compute how far the box's clock is ahead of the laptop's.

    sent, received: the laptop's time before and after the call. The probe's own time is not part of
    the round trip.
    """
    if facts.clock is None:
        return None
    half = max(0.0, received - sent - (facts.elapsed_s or 0.0)) / 2
    return ClockOffset(facts.clock - (sent + half), half)
