"""What probe.sh said of a box, as typed values; and what follows from them: provider, folder,
runtime, way to the hub, clock.

All of it is pure. A line that is torn, or of a kind that is not known here, says nothing; what
nothing was said of is None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, cast, get_args

from env.settings import Limits, Provider
from jobs.fitness import Holder

PROBE_S = 6.0  # that it takes at most, on the box
OUR_FOLDER = "rlhf-box"
# A few hundred bytes that every mirror has, and a job needs anyhow.
SMALL_FILE = "facebook/opt-125m/resolve/main/config.json"
Way = Literal["direct", "mirror", "proxy"]
UNLIMITED = 2**60  # cgroups of version 1 have no word for it, but numbers near 2^63


# --- what is sent ---------------------------------------------------------------------------------


def probe_args(
    providers: Mapping[str, Provider], *, data_folder: str = "", hub: str = "https://huggingface.co", mirror: str = ""
) -> list[str]:
    """data_folder: the one that boxes.yaml names, if any. hub, mirror: addresses; an empty one is
    not tried.
    """
    known = providers.values()
    wanted = {
        "root": [
            _root(folder)
            for folder in ([data_folder] if data_folder else [folder for each in known for folder in each.data_folders])
        ],
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
    """One copy from card to card that was compared."""

    source: int
    target: int
    access: bool | None  # the driver offers peer access
    result: str  # right, wrong, or what failed


@dataclass(frozen=True)
class Docker:
    client: str = ""  # its version; "" where there is none
    server: str = ""  # the daemon's; "" where it does not answer
    error: str = ""  # why not
    compose: str = ""
    buildx: str = ""
    runtimes: tuple[str, ...] = ()
    gpu_code: int | None = None  # exit code of a container with GPUs; None: not tried
    gpu_cards: int | None = None  # that it saw
    gpu_image: str = ""
    gpu_said: str = ""  # its first line, or why nothing was tried


@dataclass(frozen=True)
class Place:
    """Where our folder lies, or would lie."""

    root: str
    found: str = ""  # itself, or the nearest parent that is there
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
    """A way to the model hub, measured with a small file. Never two ways at once."""

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
    elapsed_s: float | None = None  # that it took on the box
    late: tuple[str, ...] = ()  # parts that were ended when their time was over
    clock: float | None = None  # the box's time when the probe began
    hostname: str = ""
    boot: str = ""
    kernel: str = ""
    machine: str = ""  # x86_64
    user: str = ""
    uid: int | None = None
    gid: int | None = None
    home: str = ""
    variables: frozenset[str] = frozenset()  # of the environment: names alone, of process 1 and of our shell
    files: frozenset[str] = frozenset()  # of those asked for
    container: bool = False
    hypervisor: bool = False
    driver: str | None = None
    cards: tuple[GpuCard, ...] | None = None  # None: not known; (): none
    smi_error: str = ""
    holders: tuple[Holder, ...] = ()
    kernel_log: bool = False  # it can be read
    topology: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    peers_said: str = ""  # why they were not tried
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


class _Said:
    """The lines, by key."""

    def __init__(self, text: str) -> None:
        self.values: dict[str, list[str]] = {}
        *lines, _torn = text.split("\n")  # what has no newline is torn, or nothing
        for line in lines:
            key, tab, value = line.partition("\t")
            if tab and value:
                self.values.setdefault(key, []).append(value)

    def all_values(self, key: str) -> list[str]:
        return self.values.get(key, [])

    def value(self, key: str) -> str:
        return self.all_values(key)[0] if key in self.values else ""

    def rows(self, key: str, fields: int) -> Iterator[list[str]]:
        """Values of so many fields; only the last may hold a bar."""
        for value in self.all_values(key):
            parts = [part.strip() for part in value.split("|", fields - 1)]
            if len(parts) == fields:
                yield parts

    def row(self, key: str, fields: int, first: str) -> list[str] | None:
        return next((parts for parts in self.rows(key, fields) if parts[0] == first), None)


def parse(answer: str | bytes) -> BoxFacts:
    said = _Said(answer.decode("utf-8", "replace") if isinstance(answer, bytes) else answer)
    cards = _cards(said)
    limit, used = _memory(said)
    shm, home = _df(said.value("shm")), _df(said.value("home_disk"))
    elapsed_ms, clock = _int(said.value("end")), _float(said.value("clock"))
    return BoxFacts(
        complete=elapsed_ms is not None,
        elapsed_s=None if elapsed_ms is None else elapsed_ms / 1000,
        late=tuple(said.all_values("late")),
        clock=clock,
        hostname=said.value("hostname"),
        boot=said.value("boot"),
        kernel=said.value("kernel"),
        machine=said.value("machine"),
        user=said.value("user"),
        uid=_int(said.value("uid")),
        gid=_int(said.value("gid")),
        home=said.value("home"),
        variables=frozenset(said.all_values("environ")),
        files=frozenset(said.all_values("file")),
        container=bool(said.all_values("container")) or said.value("root_file_system") == "overlay",
        hypervisor=said.value("hypervisor") == "1",
        driver=_driver(said),
        cards=cards,
        smi_error=next((parts[1] for parts in said.rows("smi_error", 2) if parts[0] == "gpu"), ""),
        holders=_holders(said, cards or ()),
        kernel_log=said.value("kernel_log") == "1",
        topology=tuple(said.all_values("topology")),
        peers=tuple(_peers(said)),
        peers_said=said.value("peers"),
        shm_bytes=shm[0],
        shm_free_bytes=shm[1],
        home_free_bytes=home[1],
        cores=_cores(said),
        memory_bytes=limit,
        memory_free_bytes=None if limit is None or used is None else max(0, limit - used),
        cpu_flags=tuple(said.value("cpu_flags").split()) or None,
        places=tuple(_place(said, index, root) for index, root in said.rows("root", 2)),
        pythons=tuple(
            dict.fromkeys(
                Python(path, version, whole == "1")
                for version, whole, path in said.rows("python", 3)
                if _is_version(version)
            )
        ),
        condas=tuple(sorted({(path, version) for version, path in said.rows("conda", 2)}, key=_conda_order)),
        tools=dict(said.rows("tool", 2)),
        rsync=_version_in(said.value("rsync")),
        gnu_tar="GNU tar" in said.value("tar") if said.value("tar") else None,
        docker=_docker(said),
        routes=tuple(_routes(said)),
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


def _driver(said: _Said) -> str | None:
    versions = [row[6] for row in said.rows("gpu", 8)] + re.findall(r"\s([0-9]+(?:\.[0-9]+)+)\s", said.value("nvrm"))
    return next(filter(_is_version, versions), None)


def _cards(said: _Said) -> tuple[GpuCard, ...] | None:
    rows = [row for row in said.rows("gpu", 8) if _int(row[0]) is not None]
    if not rows:
        # Nothing of NVIDIA is here; where something is and says nothing, it hangs or is broken: not
        # known.
        nothing = not (said.all_values("card_file") or said.value("nvrm") or said.all_values("smi_error"))
        smi_is_here = any(name == "nvidia-smi" for name, _ in said.rows("tool", 2))
        return () if said.value("probe") and nothing and (not smi_is_here or said.value("gpus_asked")) else None
    xids = _xids(said)
    cards = []
    for index, uuid, bus, total, used, busy, _, name in rows:
        capability, ecc = said.row("capability", 3, index), said.row("ecc", 3, index)
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
    """`00000000:65:00.0`, `0000:65:00` -> `65:00`, with the domain where it is not 0: a host's log
    names cards of others, too.
    """
    domain, _, rest = text.lower().partition(":")
    rest = rest.partition(".")[0]
    return rest if not domain.strip("0") else f"{domain.lstrip('0')}:{rest}"


def _xids(said: _Said) -> list[tuple[str, int]]:
    found = (re.search(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): ([0-9]+)", line) for line in said.all_values("xid"))
    return [(_bus(each[1]), int(each[2])) for each in found if each]


def _holders(said: _Said, cards: Iterable[GpuCard]) -> tuple[Holder, ...]:
    indexes = {card.uuid: card.index for card in cards}
    listed = [
        Holder(indexes.get(uuid), int(pid), _mebibytes(used), command)
        for uuid, pid, used, command in said.rows("holder", 4)
        if pid.isdecimal()
    ]
    known = {holder.pid for holder in listed}
    others = [Holder(None, int(pid), None, command) for pid, command in said.rows("opener", 2) if pid.isdecimal()]
    return (*listed, *(holder for holder in others if holder.pid not in known))


def _peers(said: _Said) -> Iterator[Peer]:
    for source, target, access, result in said.rows("peer", 4):
        if source.isdecimal() and target.isdecimal() and result:
            yield Peer(int(source), int(target), {"1": True, "0": False}.get(access), result)


def _df(line: str) -> tuple[int | None, int | None]:
    """`/dev/vda 1000 400 600 40% /data` of `df -P -k` -> (bytes in all, bytes free); the device's
    name may hold blanks.
    """
    total, free = _df_numbers(line)
    return (None if total is None else total * 1024, None if free is None else free * 1024)


def _df_numbers(line: str) -> tuple[int | None, int | None]:
    found = re.search(r"\s([0-9]+)\s+([0-9]+)\s+(-?[0-9]+)\s+([0-9]+%|-)\s+/", line)
    return (int(found[1]), max(0, int(found[3]))) if found else (None, None)


def _cores(said: _Said) -> float | None:
    """As many as the cgroup gives time for, at most those that we may run on."""
    quotas = [_float(said.value("cores"))]
    for value in said.all_values("cpu_max"):
        quota, _, period = value.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            quotas.append(int(quota) / int(period))
    return min((each for each in quotas if each), default=None)


def _memory(said: _Said) -> tuple[int | None, int | None]:
    """-> (bytes that this box may use, those in use): the narrowest of the machine's and of each
    cgroup's.
    """
    total, available = _int(said.value("MemTotal")), _int(said.value("MemAvailable"))
    bounds = [(total * 1024, (total - (available if available is not None else total)) * 1024)] if total else []
    for limit, used, cached in said.rows("memory_max", 3):
        if limit.isdecimal() and used.isdecimal() and int(limit) < UNLIMITED:
            bounds.append((int(limit), max(0, int(used) - (_int(cached) or 0))))
    return min(bounds, key=lambda bound: bound[0] - bound[1], default=(None, None))


def _place(said: _Said, index: str, root: str) -> Place:
    at, missing, mount = said.row("place", 5, index), said.row("missing", 2, index), said.row("mount", 3, index)
    disk, inodes = said.row("disk", 2, index), said.row("inodes", 2, index)
    lines = [line.partition(" ") for place, line in said.rows("deployed", 2) if place == index]
    slot = {name: value for place, name, value in said.rows("slot", 3) if place == index}
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
        marked=index in said.all_values("marker"),
        deployed={key: value for key, _, value in lines if key} if lines else None,
        slot=slot or None,
        slot_alive=index in said.all_values("slot_alive"),
    )


def _free_inodes(line: str) -> int | None:
    total, free = _df_numbers(line)
    return free if total else None  # Btrfs and others have no such number


def _conda_order(conda: tuple[str, str]) -> tuple[int, str]:
    name = PurePosixPath(conda[0]).name
    known = ("conda", "mamba", "micromamba", "uv")
    return (known.index(name) if name in known else len(known), conda[0])


def _docker(said: _Said) -> Docker:
    daemon = next(said.rows("docker_daemon", 4), None)
    tried = next(said.rows("docker_gpu", 4), None)
    return Docker(
        client=_version_in(said.value("docker")),
        server=daemon[0] if daemon else "",
        error="" if daemon else said.value("docker_error"),
        compose=_version_in(said.value("docker_compose")),
        buildx=_version_in(said.value("docker_buildx")),
        runtimes=tuple(daemon[2].split()) if daemon else (),
        gpu_code=_int(tried[0]) if tried else None,
        gpu_cards=_int(tried[1]) if tried else None,
        gpu_image=tried[2] if tried else "",
        gpu_said=tried[3] if tried else said.value("docker_gpu"),
    )


def _routes(said: _Said) -> Iterator[HubRoute]:
    for name, status, connect, total, _size, error in said.rows("hub", 6):
        if name in get_args(Way):
            yield HubRoute(cast(Way, name), _int(status) or None, _float(connect), _float(total), error)


# --- what follows ---------------------------------------------------------------------------------


def provider_of(facts: BoxFacts | None, providers: Mapping[str, Provider], chosen: str = "") -> Provider:
    """The one that boxes.yaml names; else the one whose signs are there; else the generic one.

    Other providers have some of the same files, so a name of a host or a variable counts more than
    a file.
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
    """A provider's `$HOME/...`, as it is on the box."""
    return (
        f"{facts.home or '/root'}{path.removeprefix('$HOME')}" if path == "$HOME" or path.startswith("$HOME/") else path
    )


def place_of(facts: BoxFacts, provider: Provider, data_folder: str = "") -> Place:
    """Where our folder is: in the folder that boxes.yaml names, else in the provider's first that
    is there, else at home.
    """
    wanted = [home_path(folder, facts) for folder in ((data_folder,) if data_folder else provider.data_folders)]
    known = {place.root: place for place in facts.places}
    places = [known.get(_root(folder), Place(_root(folder))) for folder in wanted]
    there = [
        place
        for place, folder in zip(places, wanted, strict=True)
        if place.found in (folder.rstrip("/") or "/", place.root)
    ]
    home = _root(home_path("$HOME", facts))
    if there or data_folder:
        return (there or places)[0]
    return known.get(home, Place(home))


@dataclass(frozen=True)
class Runtime:
    name: Literal["docker", "bare"]
    why: str
    lacking: str = ""  # bare, though Docker is there: what keeps it from being used


def runtime_of(facts: BoxFacts) -> Runtime:
    """Docker only if all of it is there, and reaches the GPUs if there are any."""
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
    """A container saw cards.

    Where none could tell (no image, or one that runs no nvidia-smi: 126, 127), NVIDIA's runtime is
    listed.
    """
    if docker.gpu_code in (None, 126, 127):
        return "nvidia" in docker.runtimes
    return docker.gpu_code == 0 and bool(docker.gpu_cards)


def route_of(facts: BoxFacts, limits: Limits, prefer: str = "") -> HubRoute | None:
    """The one way to the hub: the preferred if it works at all, else the direct one if it is quick
    enough, else the quickest.
    """
    working = [route for route in facts.routes if route.works]
    chosen = [route for route in working if route.name == prefer]
    direct = [
        route for route in working if route.name == "direct" and (route.total_s or 0) <= limits.hub.small_file_max_s
    ]
    quickest = sorted(working, key=lambda route: route.total_s or 0)
    return next(iter([*chosen, *direct, *quickest]), None)


@dataclass(frozen=True)
class ClockOffset:
    seconds: float  # the box's clock is ahead by so much
    within_s: float  # as well as the round trip lets one know


def clock_offset(facts: BoxFacts, sent: float, received: float) -> ClockOffset | None:
    """sent, received: the laptop's time around the call.

    What the probe itself took is no part of the round trip.
    """
    if facts.clock is None:
        return None
    half = max(0.0, received - sent - (facts.elapsed_s or 0.0)) / 2
    return ClockOffset(facts.clock - (sent + half), half)
