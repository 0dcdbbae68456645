from __future__ import annotations

from dataclasses import replace

import pytest

from env.settings import Limits, Provider
from jobs.fitness import Holder
from remote.scripts import script
from remote.survey.facts import (
    BoxFacts,
    ClockOffset,
    Docker,
    GpuCard,
    HubRoute,
    Peer,
    Place,
    Python,
    clock_offset,
    parse,
    place_of,
    probe_args,
    provider_of,
    route_of,
    runtime_of,
)

PROVIDERS = Provider.load_all()
LIMITS = Limits.load()
MIB = 2**20

# As the probe says it on a RunPod box with two RTX 4090.
RUNPOD = """clock\t1700000000.250000000
probe\t1
hostname\t3f2a1b
boot\tb0-0t
kernel\tLinux 6.8.0-40-generic
machine\tx86_64
user\troot
uid\t0
gid\t0
home\t/root
environ\tRUNPOD_POD_ID
environ\tHF_TOKEN
file\t/etc/rp_environment
root_file_system\toverlay
root\t0|/root/autodl-tmp/rlhf-box
root\t1|/root/rlhf-box
root\t2|/workspace/rlhf-box
place\t2|1|1|0|/workspace
missing\t2|/workspace/rlhf-box
place\t0|1|1|0|/root
missing\t0|/root/autodl-tmp
place\t1|1|1|0|/root
missing\t1|/root/rlhf-box
disk\t2|my disk  1000 400 600      40% /workspace
inodes\t2|my disk  100000 1000 99000       1% /workspace
mount\t2|ext4|rw,relatime
disk\t1|overlay  1000 900 -1     100% /
inodes\t1|overlay  0 0 0       - /
mount\t1|overlay|ro,relatime
gpu\t0|GPU-a|00000000:01:00.0|24564|1024|7|550.54.15|NVIDIA GeForce RTX 4090
gpu\t1|GPU-b|00000000:C1:00.0|24564|[N/A]|[N/A]|550.54.15|NVIDIA GeForce RTX 4090
gpus_asked\t1
capability\t0|GPU-a|8.9
capability\t1|GPU-b|[N/A]
ecc\t0|0|3
ecc\t1|[N/A]|[N/A]
holder\tGPU-a|4321|900|/usr/bin/python -m rlhf_train.worker | tee
holder\tGPU-?|77|[N/A]|
opener\t4321|/usr/bin/python
opener\t99|Xorg :0
xid\t[1.0] NVRM: Xid (PCI:0000:c1:00): 79, pid=1
xid\t[2.0] NVRM: Xid (PCI:0001:c1:00): 48, pid=1
xid\tnonsense
kernel_log\t1
topology\t GPU0 GPU1
peer\t0|1|1|right
peer\t1|0|0|failed cuMemcpyPeer 217
peer\tx|0|0|right
shm\ttmpfs 65536 0 65536 0% /dev/shm
MemTotal\t1000000
MemAvailable\t900000
memory_max\t512000000|400000000|100000000
memory_max\tmax|5|0
cores\t64
cpu_max\tmax 100000
cpu_max\t800000 100000
cpu_flags\tfpu avx2
tool\trsync|/usr/bin/rsync
python\t3.11.9|1|/usr/bin/python3
python\t3.10.12|0|/usr/bin/python3.10
python\tsoon|1|/x
conda\tuv 0.4.1|/usr/bin/uv
conda\tconda 24.1|/root/miniconda3/bin/conda
rsync\trsync  version 3.2.7  protocol version 31
tar\ttar (GNU tar) 1.34
docker_error\t
hub\tdirect|200|0.120|0.610|651|
hub\tmirror|000|0.0|4.0|0|curl: (28) timed out | really
hub\tcarrier-pigeon|200|0|1|2|
late\tdocker
unheard of\tvalue
end\t1500
"""


def test_what_the_probe_says() -> None:
    facts = parse(RUNPOD)
    assert facts == parse(RUNPOD.encode())
    assert (facts.complete, facts.elapsed_s, facts.clock, facts.late) == (True, 1.5, 1700000000.25, ("docker",))
    assert (facts.hostname, facts.boot, facts.machine, facts.user, facts.uid, facts.gid) == (
        "3f2a1b",
        "b0-0t",
        "x86_64",
        "root",
        0,
        0,
    )
    assert (facts.container, facts.hypervisor, facts.driver, facts.kernel_log) == (True, False, "550.54.15", True)
    assert facts.cards == (
        GpuCard(0, "GPU-a", "00000000:01:00.0", "NVIDIA GeForce RTX 4090", 24564 * MIB, 1024 * MIB, 7, "8.9", 0, 3, ()),
        GpuCard(
            1, "GPU-b", "00000000:C1:00.0", "NVIDIA GeForce RTX 4090", 24564 * MIB, None, None, None, None, None, (79,)
        ),
    )
    assert facts.holders == (
        Holder(0, 4321, 900 * MIB, "/usr/bin/python -m rlhf_train.worker | tee"),
        Holder(None, 77, None, ""),
        Holder(None, 99, None, "Xorg :0"),
    )
    assert facts.peers == (Peer(0, 1, True, "right"), Peer(1, 0, False, "failed cuMemcpyPeer 217"))
    assert (facts.shm_bytes, facts.shm_free_bytes, facts.cores) == (64 * MIB, 64 * MIB, 8.0)
    assert (facts.memory_bytes, facts.memory_free_bytes) == (512_000_000, 212_000_000)
    assert facts.pythons == (
        Python("/usr/bin/python3", "3.11.9", True),
        Python("/usr/bin/python3.10", "3.10.12", False),
    )
    assert facts.condas == (("/root/miniconda3/bin/conda", "conda 24.1"), ("/usr/bin/uv", "uv 0.4.1"))
    assert (facts.rsync, facts.gnu_tar, facts.tools, facts.docker) == (
        "3.2.7",
        True,
        {"rsync": "/usr/bin/rsync"},
        Docker(),
    )
    assert facts.routes == (
        HubRoute("direct", 200, 0.12, 0.61),
        HubRoute("mirror", None, 0.0, 4.0, "curl: (28) timed out | really"),
    )


def test_where_our_folder_may_lie() -> None:
    autodl, home, workspace = parse(RUNPOD).places
    assert workspace == Place(
        "/workspace/rlhf-box", "/workspace", "/workspace/rlhf-box", True, True, 0, 600 * 1024, 99000, "ext4", False
    )  # the device's name has a blank
    assert (home.free_bytes, home.free_inodes, home.read_only) == (
        0,
        None,
        True,
    )  # reserved blocks are less than none; no inodes are counted
    assert (autodl.found, autodl.missing, autodl.free_bytes, autodl.read_only) == (
        "/root",
        "/root/autodl-tmp",
        None,
        None,
    )


@pytest.mark.parametrize("length", range(0, len(RUNPOD), 37))
def test_an_answer_that_broke_off(length: int) -> None:
    """What stands is right, and the torn line says nothing."""
    facts, whole = parse(RUNPOD[:length]), parse(RUNPOD)
    assert not facts.complete and facts.driver in (None, whole.driver) and facts.cores in (None, 64.0, 8.0)
    assert {card.name for card in facts.cards or ()} <= {"NVIDIA GeForce RTX 4090"}
    assert all(route.error in ("", "curl: (28) timed out | really") for route in facts.routes)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n",
        "sh: 1: eval: not found\n",
        "gpu\t\n",
        "gpu\tx|y\n",
        "place\t0\nroot\t0|/a\n",
        b"\xff\xfe\t\xff\n",
        "end\tsoon\n",
    ],
)
def test_nonsense_is_not_known(answer: str | bytes) -> None:
    facts = parse(answer)
    assert not facts.complete and facts.cards is None and facts.driver is None and facts.cores is None


@pytest.mark.parametrize(
    ("lines", "cards"),
    [
        ("probe\t1\n", ()),
        ("probe\t1\ntool\tnvidia-smi|/usr/bin/nvidia-smi\ngpus_asked\t1\n", ()),
        ("probe\t1\ntool\tnvidia-smi|/usr/bin/nvidia-smi\n", None),  # it hangs
        ("probe\t1\ncard_file\tnvidia0\n", None),  # a card without nvidia-smi
        ("probe\t1\nnvrm\tNVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu\n", None),
        ("probe\t1\ngpus_asked\t1\nsmi_error\tgpu|GPU is lost\n", None),
        ("", None),
    ],
)
def test_no_card_is_not_the_same_as_not_known(lines: str, cards: tuple[GpuCard, ...] | None) -> None:
    assert parse(lines).cards == cards


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build  (root@x)",
    ],
)
def test_the_driver_where_nvidia_smi_does_not_say(line: str) -> None:
    assert parse(f"nvrm\t{line}\n").driver == "535.129.03"


# --- provider and folder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "chosen", "name"),
    [
        (BoxFacts(hostname="autodl-container-9b1a-5c"), "", "autodl"),
        (BoxFacts(hostname="my-autodl-container-9b1a"), "", "generic"),
        (BoxFacts(variables=frozenset({"RUNPOD_POD_ID"})), "", "runpod"),
        (BoxFacts(variables=frozenset({"CONTAINER_ID", "CONTAINER_API_KEY"})), "", "vast"),
        (BoxFacts(variables=frozenset({"CONTAINER_ID"})), "", "generic"),
        (BoxFacts(files=frozenset({"/etc/network_turbo"})), "", "generic"),  # others have it, too
        (BoxFacts(files=frozenset({"/lambda/nfs"})), "", "lambda"),
        (BoxFacts(hostname="autodl-container-9b1a", files=frozenset({"/etc/rp_environment"})), "", "autodl"),
        (BoxFacts(hostname="autodl-container-9b1a"), "lambda", "lambda"),
        (BoxFacts(), "unheard-of", "generic"),
        (None, "", "generic"),
    ],
)
def test_the_provider(facts: BoxFacts | None, chosen: str, name: str) -> None:
    assert provider_of(facts, PROVIDERS, chosen).name == name


def test_the_folder() -> None:
    facts = parse(RUNPOD)
    assert place_of(facts, PROVIDERS["runpod"]).root == "/workspace/rlhf-box"
    assert place_of(facts, PROVIDERS["autodl"]).root == "/root/rlhf-box"  # its data disk is not there
    assert place_of(facts, PROVIDERS["generic"]).root == "/root/rlhf-box"
    assert place_of(facts, PROVIDERS["generic"], "/workspace/").root == "/workspace/rlhf-box"
    assert place_of(facts, PROVIDERS["generic"], "/elsewhere") == Place("/elsewhere/rlhf-box")  # not asked for


def test_a_folder_that_is_there_already() -> None:
    facts = BoxFacts(
        home="/root", places=(Place("/workspace/rlhf-box", "/workspace/rlhf-box"), Place("/root/rlhf-box", "/root"))
    )
    assert place_of(facts, PROVIDERS["vast"]).root == "/workspace/rlhf-box"


def test_what_the_probe_is_asked() -> None:
    args = probe_args(PROVIDERS, mirror="https://hf-mirror.com/")
    assert args.count("root=$HOME/rlhf-box") == 1 and args.count("root=/workspace/rlhf-box") == 1
    assert {"proxy=/etc/network_turbo", "file=/etc/rp_environment", "conda=/root/miniconda3/bin/conda"} <= set(args)
    assert "direct=https://huggingface.co/facebook/opt-125m/resolve/main/config.json" in args
    assert "mirror=https://hf-mirror.com/facebook/opt-125m/resolve/main/config.json" in args
    assert [
        arg
        for arg in probe_args(PROVIDERS, data_folder="/a b/", hub="")
        if arg.startswith(("root", "direct", "mirror"))
    ] == ["root=/a b/rlhf-box"]
    assert b"@GPU_COPY_CHECK@" not in script("probe.sh") and b"cuMemcpyPeer" in script("probe.sh")


# --- runtime --------------------------------------------------------------------------------------

WHOLE = Docker(client="27.3.1", server="27.3.1", compose="2.29.7", runtimes=("nvidia", "runc"), gpu_code=0, gpu_cards=1)
ONE_CARD = BoxFacts(cards=(GpuCard(0),), docker=WHOLE)


@pytest.mark.parametrize(
    ("docker", "cards", "name", "lacking"),
    [
        ({}, (GpuCard(0),), "docker", ""),
        ({"client": "", "server": ""}, (), "bare", ""),
        ({"server": ""}, (), "bare", "daemon"),
        ({"compose": ""}, (), "bare", "compose"),
        ({"gpu_code": 125, "gpu_cards": 0}, (GpuCard(0),), "bare", "gpu"),
        ({"gpu_code": 125, "gpu_cards": 0}, None, "bare", "gpu"),  # maybe there are some
        ({"gpu_code": 125, "gpu_cards": 0}, (), "docker", ""),  # nobody asks for them
        ({"gpu_code": 0, "gpu_cards": 0}, (GpuCard(0),), "bare", "gpu"),
        ({"gpu_code": None}, (GpuCard(0),), "docker", ""),
        ({"gpu_code": None, "runtimes": ("runc",)}, (GpuCard(0),), "bare", "gpu"),
        ({"gpu_code": 127, "gpu_cards": 0}, (GpuCard(0),), "docker", ""),
    ],
)
def test_the_runtime(docker: dict[str, object], cards: tuple[GpuCard, ...] | None, name: str, lacking: str) -> None:
    runtime = runtime_of(replace(ONE_CARD, cards=cards, docker=replace(WHOLE, **docker)))  # type: ignore[arg-type]
    assert (runtime.name, runtime.lacking) == (name, lacking)


# --- the hub and the clock ------------------------------------------------------------------------

DIRECT, MIRROR, PROXY = (
    HubRoute("direct", 200, 0.1, 0.9),
    HubRoute("mirror", 206, 0.1, 0.2),
    HubRoute("proxy", 200, 0.1, 0.5),
)
SLOW, SHUT = replace(DIRECT, total_s=3.5), replace(DIRECT, status=None, error="timed out")


@pytest.mark.parametrize(
    ("routes", "prefer", "chosen"),
    [
        ((DIRECT, MIRROR, PROXY), "", DIRECT),
        ((SLOW, MIRROR, PROXY), "", MIRROR),
        ((SHUT, PROXY), "", PROXY),
        ((SLOW,), "", SLOW),
        ((DIRECT, MIRROR, PROXY), "proxy", PROXY),
        ((SHUT, MIRROR), "direct", MIRROR),
        ((SHUT, HubRoute("mirror", 404, 0.1, 0.2)), "", None),
        ((), "mirror", None),
    ],
)
def test_one_way_to_the_hub(routes: tuple[HubRoute, ...], prefer: str, chosen: HubRoute | None) -> None:
    assert route_of(BoxFacts(routes=routes), LIMITS, prefer) == chosen


@pytest.mark.parametrize(
    ("clock", "elapsed", "sent", "received", "offset"),
    [
        (1000.5, 2.0, 1000.0, 1003.0, ClockOffset(0.0, 0.5)),  # half a second each way, two there
        (1060.5, 2.0, 1000.0, 1003.0, ClockOffset(60.0, 0.5)),
        (940.5, 2.0, 1000.0, 1003.0, ClockOffset(-60.0, 0.5)),
        (1000.0, 9.0, 1000.0, 1003.0, ClockOffset(0.0, 0.0)),
        (None, 2.0, 1000.0, 1003.0, None),
    ],
)
def test_the_clock(
    clock: float | None, elapsed: float, sent: float, received: float, offset: ClockOffset | None
) -> None:
    assert clock_offset(BoxFacts(clock=clock, elapsed_s=elapsed), sent, received) == offset
