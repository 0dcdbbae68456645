from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from env.settings import Limits, Provider
from jobs.fitness import Holder
from jobs.spec import Job, load_job
from remote.ssh.link import Link
from remote.survey.doctor import Check, Diagnosis, diagnose, hub_names, peer_access_off
from remote.survey.facts import BoxFacts, ClockOffset, Docker, GpuCard, HubRoute, Peer, Place, Python

PROVIDERS, LIMITS = Provider.load_all(), Limits.load()
GB, MIB = 10**9, 2**20
JOB, DEMO = load_job("opt-1.3b"), load_job("demo")
RTX_4090 = GpuCard(0, "GPU-a", "00000000:01:00.0", "NVIDIA GeForce RTX 4090", 24 * GB, 0, 0, "8.9")
H100 = GpuCard(0, "GPU-h", "00000000:65:00.0", "NVIDIA H100 80GB HBM3", 80 * GB, 0, 0, "9.0", 0, 0)
PLACE = Place(
    "/root/autodl-tmp/rlhf-box",
    "/root/autodl-tmp",
    "/root/autodl-tmp/rlhf-box",
    True,
    True,
    0,
    50 * GB,
    3_000_000,
    "xfs",
    False,
)
BARE = BoxFacts(
    complete=True,
    elapsed_s=1.2,
    hostname="autodl-container-9b1a",
    machine="x86_64",
    uid=0,
    gid=0,
    home="/root",
    container=True,
    driver="550.54.15",
    cards=(H100,),
    shm_free_bytes=40 * GB,
    cores=12.0,
    memory_bytes=90 * GB,
    memory_free_bytes=80 * GB,
    places=(PLACE,),
    pythons=(Python("/usr/bin/python3", "3.8.10", True),),
    condas=(("/root/miniconda3/bin/conda", "conda 22.11"),),
    routes=(HubRoute("direct", None, None, None, "timed out"), HubRoute("mirror", 200, 0.05, 0.31)),
)
WHOLE = Docker("27.3.1", "27.3.1", "", "2.29.7", "0.17.1", ("nvidia", "runc"), 0, 1, "rlhf-box:cu118", "GPU 0: H100")
MACHINE = replace(BARE, container=False, docker=WHOLE)
LINK = Link(seconds=0.142, host_key="known", fingerprint="SHA256:abc")
NAMES = [
    "reachable",
    "host key",
    "provider",
    "flavour",
    "driver",
    "card 0",
    "capability",
    "P2P",
    "/dev/shm",
    "CPU and memory",
    "disk",
    "inodes",
]
NAMES += ["Python", "Docker", "hub", "clock"]


def examine(facts: BoxFacts | None = BARE, job: Job | None = JOB, link: Link = LINK, **more: Any) -> Diagnosis:
    return diagnose(facts, job, LIMITS, PROVIDERS["autodl"], link, **{"offset": ClockOffset(0.2, 0.05), **more})


def check(name: str, facts: BoxFacts | None = BARE, job: Job | None = JOB, **more: Any) -> Check:
    (found,) = [each for each in examine(facts, job, **more).checks if each.name == name]
    return found


def status(name: str, facts: BoxFacts | None = BARE, job: Job | None = JOB, **more: Any) -> str:
    return check(name, facts, job, **more).status


def with_settings(*settings: str, job: str = "opt-1.3b") -> Job:
    return load_job(job, settings)


# --- the whole ------------------------------------------------------------------------------------


def test_a_fit_box_line_by_line() -> None:
    assert examine().lines() == [
        "ok       reachable       in 142 ms",
        "ok       host key        SHA256:abc",
        "ok       provider        AutoDL, container; runtime bare (no Docker)",
        "ok       flavour         cu118: the default",
        "ok       driver          550.54.15, for CUDA 11.8",
        "ok       card 0          NVIDIA H100 80GB HBM3, 80 GB, 0 bytes in use",
        "ok       capability      9.0; CUDA 11.8 supports 7.0 to 9.0",
        "ok       P2P             not needed",
        "ok       /dev/shm        40 GB free",
        "ok       CPU and memory  12 cores, 90 GB, 80 GB of it free",
        "ok       disk            50 GB free at /root/autodl-tmp (xfs)",
        "ok       inodes          3000000 free at /root/autodl-tmp",
        "ok       Python          3.10 will be made by /root/miniconda3/bin/conda",
        "ok       Docker          none, and none is needed: the bare runtime is used",
        "ok       hub             mirror (direct no answer, mirror 0.31 s)",
        "ok       clock           0.2 s ahead (to 0.1 s)",
        "fit for opt-1.3b",
    ]


def test_a_machine_with_docker() -> None:
    diagnosis = examine(MACHINE)
    assert diagnosis.fit and [each.name for each in diagnosis.checks] == NAMES
    assert check("provider", MACHINE).value == "AutoDL, machine; runtime docker (Docker 27.3.1, Compose 2.29.7)"
    assert check("Docker", MACHINE).value == "27.3.1, Compose 2.29.7, buildx 0.17.1; a container saw 1 card"
    assert check("Python", MACHINE).value == "3.10, in the image"


def test_the_order_is_always_the_same() -> None:
    assert [each.name for each in examine(BoxFacts()).checks] == [*NAMES[:5], "cards", *NAMES[6:]]
    assert [each.name for each in examine(None).checks] == [*NAMES[:5], "cards", *NAMES[6:]]


def test_of_a_box_of_which_nothing_is_known_nothing_bad_is_said_but_of_its_answer() -> None:
    bad = {each.name: each.status for each in examine(BoxFacts(), None).checks if each.status in ("warning", "unfit")}
    assert bad == {"reachable": "warning", "Python": "unfit"}


def test_a_box_that_is_not_reached() -> None:
    link = Link(reached=False, error="connection refused", todo="start the box")
    diagnosis = examine(None, link=link)
    assert not diagnosis.fit and diagnosis.verdict == "not fit for opt-1.3b: the box was not reached"
    assert {each.status for each in diagnosis.checks[1:]} == {"unknown"}
    assert [line.split()[:2] for line in diagnosis.lines()] == [
        ["unfit", "reachable"],
        ["unknown", "host"],
        ["not", "fit"],
    ]


def test_a_changed_host_key_is_said_once() -> None:
    link = Link(reached=False, error="the host key changed", host_key="changed", fingerprint="SHA256:new")
    lines = examine(None, link=link).lines()
    assert [line.split()[0] for line in lines] == ["unfit", "unfit", "not"] and sum(
        "fab trust" in line for line in lines
    ) == 1


def test_the_verdict_names_what_makes_it_unfit_and_counts_the_rest() -> None:
    assert examine(job=None).verdict == "fit"
    assert (
        examine(replace(BARE, cores=1.0, late=("ecc",)), offset=ClockOffset(90.0, 0.1)).verdict
        == "fit for opt-1.3b, with 2 warnings"
    )
    blackwell = replace(
        BARE, cards=(replace(H100, name="NVIDIA GeForce RTX 5090", capability="12.0"),), shm_free_bytes=0
    )
    verdict = examine(blackwell).verdict  # each flavour has something against it: its card, or its driver
    assert verdict.startswith(
        "not fit for opt-1.3b: no flavour runs here: cu118: NVIDIA GeForce RTX 5090 (compute capability 12.0) is newer "
        "than the 9.0 that this build for CUDA 11.8 knows; cu130: its driver 550.54.15 is older than the 580.65.06 "
        "that CUDA 13.0 needs: install a newer driver on the host, or take another box; "
    )
    checks = {check.name: check for check in examine(replace(blackwell, driver="580.95.05")).checks}
    assert checks["flavour"].value.startswith("cu130: cu118 does not run here, since NVIDIA GeForce RTX 5090")
    assert checks["driver"].value == "580.95.05, for CUDA 13.0"
    assert checks["capability"] == Check("capability", "ok", "12.0; CUDA 13.0 supports 7.5 to 12.1")
    assert checks["Python"].value == "3.12 will be made by /root/miniconda3/bin/conda"


def test_the_flavours_that_the_job_names() -> None:
    new = replace(BARE, driver="580.95.05")
    named, unknown_to_old = (
        load_job("opt-1.3b", ["flavours=[cu130]"]),
        load_job("opt-1.3b", ["actor.model=Qwen/Qwen3-4B"]),
    )
    assert check("flavour", new, named).value == "cu130: cu118 does not run here, since the job names cu130 alone"
    reason = "cu130: cu118 does not run here, since its transformers has no Qwen 3"
    assert check("flavour", new, unknown_to_old).value == reason
    assert check("driver", new, named).value == "580.95.05, for CUDA 13.0"
    refused = check("flavour", new, named, flavour="cu118")
    assert refused == Check(
        "flavour", "unfit", "flavour cu118 does not run here: the job names cu130 alone", "--flavour cu130 does"
    )
    assert check("flavour", BARE, named).todo == "install a newer driver on the host, or take another box"


def test_json() -> None:
    said = json.loads(json.dumps(examine().as_json()))
    assert (said["job"], said["fit"], said["verdict"]) == ("opt-1.3b", True, "fit for opt-1.3b")
    assert said["checks"][0] == {"name": "reachable", "status": "ok", "value": "in 142 ms", "todo": ""}


def test_what_a_box_says_cannot_draw_on_the_terminal() -> None:
    facts = replace(BARE, cards=(replace(H100, name="evil\x1b[2J\ncard"),))
    assert all("\x1b" not in line and "\n" not in line for line in examine(facts).lines())


# --- check by check -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "wanted"), [("known", "ok"), ("new", "ok"), ("changed", "unfit"), ("unknown", "unknown")]
)
def test_the_host_key(key: Any, wanted: str) -> None:
    assert status("host key", link=replace(LINK, host_key=key)) == wanted


@pytest.mark.parametrize(
    ("change", "wanted"),
    [({}, "ok"), ({"complete": False}, "warning"), ({"late": ("cards",)}, "warning")],
    ids=["whole", "torn", "late"],
)
def test_the_answer(change: dict[str, Any], wanted: str) -> None:
    assert status("reachable", replace(BARE, **change)) == wanted


def test_another_processor() -> None:
    found = check("provider", replace(BARE, machine="aarch64"))
    assert found.status == "unfit" and found.value.endswith("; its processor is aarch64")


def test_what_is_deployed_and_runs_is_said() -> None:
    slot = {"run": "ppo-0412", "pid": "7"}
    place = replace(PLACE, deployed={"code": "3f2a" * 16}, slot=slot, slot_alive=True)
    assert check("provider", replace(BARE, places=(place,))).value.endswith(
        "; deployed: 3f2a3f2a3f2a; a job runs: ppo-0412"
    )
    assert "a job runs" not in check("provider", replace(BARE, places=(replace(place, slot_alive=False),))).value


@pytest.mark.parametrize(
    ("driver", "wanted"),
    [("450.80.02", "ok"), ("450.80.01", "unfit"), ("440.33.01", "unfit"), ("580.65.06", "ok"), (None, "unknown")],
)
def test_the_driver(driver: str | None, wanted: str) -> None:
    assert status("driver", replace(BARE, driver=driver)) == wanted
    assert status("driver", replace(BARE, driver=driver), DEMO) == "ok"  # on the CPU


CARDS = {
    "idle": ({}, "ok", "NVIDIA H100 80GB HBM3, 80 GB, 0 bytes in use"),
    "in use": (
        {"used_bytes": 41 * GB},
        "warning",
        "GPU 0 has 41 GB in use before the job begins, by pid 4321 (python train.py, 40 GB)",
    ),
    "ECC": ({"ecc_now": 2}, "unfit", "2 uncorrected memory errors (ECC) since its driver was loaded"),
    "ECC of the past": ({"ecc_ever": 2}, "ok", ""),
    "off the bus": ({"xids": (13, 79)}, "unfit", "the kernel logged Xid 79 for it"),
    "double-bit error": ({"xids": (48, 63)}, "warning", "the kernel logged Xid 48, 63 for it"),
    "a program's own mistake": ({"xids": (13, 31, 43)}, "ok", ""),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card(case: str) -> None:
    change, wanted, text = CARDS[case]
    card = replace(H100, **change)  # type: ignore[arg-type]
    facts = replace(BARE, cards=(card,), holders=(Holder(0, 4321, 40 * GB, "python train.py"),))
    found = check("card 0", facts)
    assert found.status == wanted and text in found.value and found.value.startswith("NVIDIA H100 80GB HBM3, 80 GB")
    assert bool(found.todo) == (wanted != "ok")
    assert status("card 0", facts, DEMO) in ("ok", "warning")  # a job on the CPU does not use it


def test_the_worst_comes_first_and_nothing_is_passed_over() -> None:
    found = check("card 0", replace(BARE, cards=(replace(H100, used_bytes=9 * GB, ecc_now=1),)))
    assert found.status == "unfit" and found.value.index("1 uncorrected memory error (ECC)") < found.value.index(
        "9 GB in use before"
    )


def test_each_card_has_its_line() -> None:
    second = replace(H100, index=1, used_bytes=5 * GB)
    facts = replace(BARE, cards=(H100, second), holders=(Holder(1, 7, 5 * GB, "python a.py"),))
    assert [status(f"card {i}", facts) for i in (0, 1)] == ["ok", "warning"] and "by pid 7" in check(
        "card 1", facts
    ).value


@pytest.mark.parametrize(
    ("job", "wanted"),
    [
        (JOB, "unfit"),
        (None, "ok"),
        (DEMO, "ok"),
        (with_settings("hardware.device=cpu"), "ok"),
        (with_settings("hardware.device=cuda", job="demo"), "unfit"),
        (with_settings("hardware.device=auto", job="demo"), "warning"),  # random weights: it runs on the CPU
    ],
)
def test_no_card(job: Job | None, wanted: str) -> None:
    assert status("cards", replace(BARE, cards=(), driver=None), job) == wanted


def test_a_card_that_is_lost() -> None:
    found = check("cards", replace(BARE, cards=None, smi_error="GPU is lost"))
    assert (found.status, found.value) == ("unfit", "GPU is lost") and status(
        "cards", replace(BARE, cards=None)
    ) == "unknown"


@pytest.mark.parametrize(("ranks", "cards", "wanted"), [("2", 1, "unfit"), ("2", 2, None), ("auto", 1, None)])
def test_more_ranks_than_cards(ranks: str, cards: int, wanted: str | None) -> None:
    facts = replace(BARE, cards=tuple(replace(H100, index=i) for i in range(cards)))
    found = [each for each in examine(facts, with_settings(f"hardware.ranks={ranks}")).checks if each.name == "ranks"]
    assert [each.status for each in found] == ([wanted] if wanted else [])


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ("7.0", "ok"),
        ("8.9", "ok"),
        ("9.0", "ok"),
        ("6.1", "unfit"),
        ("10.0", "unfit"),
        ("12.0", "unfit"),
        (None, "unknown"),
    ],
)
def test_capability(capability: str | None, wanted: str) -> None:
    facts = replace(BARE, cards=(replace(H100, capability=capability),))
    assert status("capability", facts) == wanted and status("capability", facts, DEMO) == "ok"


# --- P2P ------------------------------------------------------------------------------------------

TWO = replace(BARE, driver="550.54.15", cards=(RTX_4090, replace(RTX_4090, index=1)))


def both(access: bool, *results: str) -> tuple[Peer, ...]:
    return (Peer(0, 1, access, results[0]), Peer(1, 0, access, results[-1]))


@pytest.mark.parametrize(
    ("change", "wanted", "value"),
    [
        ({"peers": both(True, "right")}, "ok", "2 of 2 paths are direct, all 2 copies are correct"),
        ({"peers": both(False, "right")}, "warning", "NVIDIA GeForce RTX 4090 has no peer access here"),
        (
            {"peers": both(True, "right", "wrong")},
            "warning",
            "what one GPU writes into another's memory arrives changed",
        ),
        (
            {"peers": both(False, "right", "wrong")},
            "unfit",
            "a copy through the main memory (GPU 1 to GPU 0) arrives changed",
        ),
        ({"peers": both(True, "right", "failed cuMemcpyPeer 217")}, "unfit", "GPU 1 to GPU 0: failed cuMemcpyPeer 217"),
        (
            {"peers": both(True, "right"), "driver": "535.129.03"},
            "warning",
            "the peer access that driver 535.129.03 offers on",
        ),
        ({"peers_said": "no libcuda.so.1"}, "unknown", "not tried: no libcuda.so.1"),
        ({"peers": both(True, "right")[:1]}, "unknown", "1 of 2 copies in time, all correct"),
    ],
)
def test_copies_between_cards(change: dict[str, Any], wanted: str, value: str) -> None:
    found = check("P2P", replace(TWO, **change))
    assert found.status == wanted and found.value.startswith(value)
    assert status("P2P", replace(TWO, **change), DEMO) == "ok"


def test_what_deploy_sets_for_the_box() -> None:
    assert (
        peer_access_off(replace(TWO, peers=both(True, "wrong")), LIMITS)
        == "what one GPU writes into another's memory arrives changed"
    )
    assert (
        peer_access_off(replace(TWO, peers=both(True, "right")), LIMITS) == "" and peer_access_off(BARE, LIMITS) == ""
    )


# --- the machine ----------------------------------------------------------------------------------


def test_shared_memory() -> None:
    small = replace(TWO, shm_free_bytes=64 * MIB)
    assert status("/dev/shm", small) == "unfit" and status("/dev/shm", small, DEMO) == "ok"
    assert status("/dev/shm", replace(BARE, shm_free_bytes=64 * MIB)) == "ok"  # one rank
    assert status("/dev/shm", replace(small, docker=replace(WHOLE, gpu_cards=2))) == "ok"  # the container has its own
    assert (
        status("/dev/shm", replace(TWO, shm_free_bytes=512 * MIB)) == "ok"
        and status("/dev/shm", replace(TWO, shm_free_bytes=None)) == "unknown"
    )


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"cores": 1.0}, "ok"),
        ({"cores": 0.5}, "unfit"),  # AutoDL's mode without a card
        ({"memory_free_bytes": 1_999_999_999}, "unfit"),
        ({"memory_free_bytes": 11 * GB}, "warning"),
        ({"cores": 1.0, "cards": TWO.cards}, "warning"),
        ({"cores": None, "memory_bytes": None, "memory_free_bytes": None}, "unknown"),
    ],
)
def test_cpu_and_memory(change: dict[str, Any], wanted: str) -> None:
    assert status("CPU and memory", replace(BARE, **change)) == wanted


def test_a_job_with_random_weights_is_content_with_little_memory() -> None:
    assert status("CPU and memory", replace(BARE, memory_free_bytes=3 * GB), DEMO) == "ok"


@pytest.mark.parametrize(
    ("change", "disk", "inodes"),
    [
        ({}, "ok", "ok"),
        ({"free_bytes": 11 * GB}, "warning", "ok"),
        ({"free_bytes": 400_000_000}, "unfit", "ok"),
        ({"free_inodes": 1999}, "ok", "unfit"),
        ({"free_inodes": None}, "ok", "ok"),  # Btrfs
        ({"read_only": True}, "unfit", "ok"),
        ({"writable": False, "uid": 5}, "unfit", "ok"),
        ({"is_folder": False}, "unfit", "ok"),
        ({"free_bytes": None}, "unknown", "ok"),
    ],
)
def test_disk_and_inodes(change: dict[str, Any], disk: str, inodes: str) -> None:
    facts = replace(BARE, places=(replace(PLACE, **change),))
    assert (status("disk", facts), status("inodes", facts)) == (disk, inodes)


@pytest.mark.parametrize(
    ("change", "todo"),
    [
        ({"read_only": True}, "mount it writable, or name another data_folder in boxes.yaml"),
        ({"writable": False, "uid": 5}, "sudo chown -R 1000:1001 "),
        ({"writable": False, "uid": 1000}, "chmod -R u+rwX "),
        ({"free_bytes": 400_000_000}, "make room there, or name another data_folder in boxes.yaml"),
    ],
)
def test_what_mends_a_disk(change: dict[str, Any], todo: str) -> None:
    facts = replace(BARE, places=(replace(PLACE, **change),), uid=1000, gid=1001)
    assert todo in check("disk", facts).todo


def test_a_disk_that_does_not_answer() -> None:
    facts = replace(BARE, places=(Place("/mnt/gone/rlhf-box"),))
    found = check("disk", facts, data_folder="/mnt/gone")
    assert found.status == "unknown" and found.value == "/mnt/gone/rlhf-box: no answer from its disk"


@pytest.mark.parametrize(
    ("pythons", "condas", "wanted", "value"),
    [
        ((Python("/usr/bin/python3", "3.10.12", True),), (), "ok", "3.10.12 at /usr/bin/python3"),
        ((Python("/usr/bin/python3", "3.10.12", False),), (), "unfit", "/usr/bin/python3 has no venv or ensurepip"),
        (
            (Python("/usr/bin/python3", "3.10.12", False),),
            BARE.condas,
            "ok",
            "3.10 will be made by /root/miniconda3/bin/conda",
        ),
        (
            (Python("/usr/bin/python3", "3.11.2", True),),
            (),
            "unfit",
            "no Python 3.10, and no conda or uv to make it with (there is: 3.11.2)",
        ),
        ((), (), "unfit", "no Python 3.10, and no conda or uv to make it with (there is: none)"),
    ],
)
def test_python(pythons: tuple[Python, ...], condas: tuple[tuple[str, str], ...], wanted: str, value: str) -> None:
    found = check("Python", replace(BARE, pythons=pythons, condas=condas))
    assert (found.status, found.value) == (wanted, value)


REFUSAL = 'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].'


@pytest.mark.parametrize(
    ("change", "wanted", "value"),
    [
        (
            {"server": "", "error": "permission denied"},
            "warning",
            "Docker's daemon does not answer (permission denied)",
        ),
        ({"compose": ""}, "warning", "Docker has no Compose"),
        (
            {"gpu_code": 125, "gpu_cards": 0, "gpu_said": REFUSAL},
            "warning",
            f"Docker does not reach the GPUs ({REFUSAL})",
        ),
        (
            {"gpu_code": 0, "gpu_cards": 0, "gpu_said": ""},
            "warning",
            "Docker does not reach the GPUs (a container saw no card)",
        ),
        ({"gpu_cards": 3}, "warning", "27.3.1, Compose 2.29.7, buildx 0.17.1; a container saw 3 cards of 1"),
        ({"buildx": ""}, "warning", "27.3.1, Compose 2.29.7; a container saw 1 card"),
        (
            {"gpu_code": None, "gpu_cards": None, "gpu_said": "no image is here"},
            "ok",
            "27.3.1, Compose 2.29.7, buildx 0.17.1; its GPU runtime is installed, not tried (no image is here)",
        ),
    ],
)
def test_docker(change: dict[str, Any], wanted: str, value: str) -> None:
    found = check("Docker", replace(MACHINE, docker=replace(WHOLE, **change)))
    assert (found.status, found.value) == (wanted, value)


# --- the hub and the clock ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routes", "prefer", "job", "wanted", "value"),
    [
        ((HubRoute("direct", 200, 0.1, 0.5),), "", JOB, "ok", "direct (direct 0.50 s)"),
        (
            (HubRoute("direct", 200, 0.1, 3.5),),
            "",
            JOB,
            "warning",
            "direct (direct 3.50 s), which is slow for a small file",
        ),
        (
            (HubRoute("direct", 200, 0.1, 0.5), HubRoute("mirror", 200, 0.1, 0.2)),
            "mirror",
            JOB,
            "ok",
            "mirror (direct 0.50 s, mirror 0.20 s)",
        ),
        ((HubRoute("direct", 403, 0.1, 0.2),), "", JOB, "unfit", "not reachable (direct HTTP 403)"),
        ((HubRoute("direct", 403, 0.1, 0.2),), "", None, "warning", "not reachable (direct HTTP 403)"),
        (
            (HubRoute("direct", None),),
            "",
            DEMO,
            "ok",
            "not reachable (direct no answer), and this job does not need it",
        ),
        ((), "", JOB, "unknown", "not reachable (not tried)"),
    ],
)
def test_the_hub(routes: tuple[HubRoute, ...], prefer: str, job: Job | None, wanted: str, value: str) -> None:
    found = check("hub", replace(BARE, routes=routes), job, prefer_route=prefer)
    assert (found.status, found.value) == (wanted, value)


def test_what_comes_from_the_hub() -> None:
    assert hub_names(JOB) == ["facebook/opt-1.3b", "facebook/opt-350m", "Dahoas/rm-static"] and hub_names(DEMO) == []
    local = with_settings(
        "actor.model=/data/opt", "critic.model=./opt", "data.datasets=[rows.jsonl, ../rows, ~/rows, gpt2]"
    )
    assert hub_names(local) == ["gpt2"]


@pytest.mark.parametrize(
    ("offset", "wanted"),
    [
        (ClockOffset(5.0, 0.0), "ok"),
        (ClockOffset(5.1, 0.0), "warning"),
        (ClockOffset(-90.0, 0.1), "warning"),
        (ClockOffset(5.5, 1.0), "ok"),  # the line is that slow
        (None, "unknown"),
    ],
)
def test_the_clock(offset: ClockOffset | None, wanted: str) -> None:
    assert status("clock", offset=offset) == wanted
