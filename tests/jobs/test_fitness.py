from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from env.settings import Limits
from jobs.errors import ExitCode
from jobs.fitness import Finding, FitnessFacts, Folder, Gpu, Holder, error_of, judge, no_peer_access, version, wants_gpu

MIB, GIB = 2**20, 2**30
# Not those of env/limits.toml, so that a changed threshold changes no test; round numbers, for a
# test to stand at the edge.
LIMITS = Limits.model_validate(
    {
        "flavours": {},
        "machine": "x86_64",
        "gpu_health": {"ecc_uncorrected_max": 0, "xid_unfit": [79], "xid_warning": [48]},
        "cpu": {"cores_min": 1.0, "cores_advised_per_rank": 1.0},
        "memory": {"bytes_min": 1_000_000, "bytes_advised": 5_000_000},
        "hub": {"small_file_max_s": 3.0, "bytes_advised": 3_000_000},
        "clock": {"offset_max_s": 5.0},
        "cuda": {
            "11.8": {
                "driver_min": "450.80.02",
                "driver_advised": "520.61.05",
                "capability_min": "7.0",
                "capability_max": "9.0",
            },
            "12.0": {"driver_min": "525.60.13", "driver_advised": "525.60.13"},
            "12.8": {"driver_min": "570.26", "driver_advised": "570.26"},
            "12.10": {"driver_min": "590.1", "driver_advised": "590.1"},
        },
        "shared_memory": {"bytes_per_rank": 256 * MIB},
        "gpu_memory": {"used_max_bytes": 1_000_000},
        "disk": {"bytes_min": 1_000_000, "bytes_advised": 5_000_000, "inodes_min": 100},
        "environment": {"bytes_cuda": 3_000_000, "bytes_cpu": 1_000_000},
        "cpu_operators": {"names": ["cpu_adam", "cpu_lion"], "flags": ["avx2", "fma"]},
        "peer_access": {"broken_cards": ["RTX 40"], "mended_driver": "550.40.07"},
    }
)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "8.9")
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", "12.0")
H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0")
P100 = Gpu("Tesla P100-PCIE-16GB", "6.0")
OURS = Folder("runs/demo", "runs/demo", writable=True, read_only=False, uid=1000, free_bytes=5_000_000, free_inodes=100)
# A box that is fit, at the edge of each threshold.
FIT = FitnessFacts(
    ranks=2,
    pretrained=True,
    cuda="11.8",
    gpus=2,
    driver="450.80.02",
    cards=(RTX_4090, H100),
    peer_access=True,
    gpu_used_bytes=(1_000_000, 0),
    shared_memory_bytes=512 * MIB,
    cpu_flags=("fpu", "avx2", "fma"),
    prebuilt_operators=("cpu_adam", "fused_adam"),
    uid=1000,
    gid=100,
    folders=(OURS,),
)
NO_GPU = replace(FIT, gpus=0, cards=None, driver=None)
ON_PURPOSE = "; to train on the CPU on purpose, --set hardware.device=cpu"


def said(facts: FitnessFacts) -> list[str]:
    return [f"{finding.level}: {finding}" for finding in judge(facts, LIMITS)]


def test_a_fit_machine() -> None:
    assert said(FIT) == []


def test_nothing_known_nothing_said() -> None:
    assert said(FitnessFacts()) == [] and said(FitnessFacts(device="cuda", cuda="11.8")) == []
    assert said(FitnessFacts(device="cuda", cuda="11.8", ranks=8, cards=(Gpu("A"),), folders=(Folder("a", "."),))) == []


# --- driver ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "driver", "line"),
    [
        ("11.8", "450.80.02", None),
        (
            "11.8",
            "450.80.01",
            "450.80.01 is too old for CUDA 11.8: install driver 520.61.05 or newer (450.80.02 at least) on the host",
        ),
        (
            "11.8",
            "440.118.02",
            "440.118.02 is too old for CUDA 11.8: install driver 520.61.05 or newer (450.80.02 at least) on the host",
        ),
        ("11.8", "1000.1", None),  # by number, not by letter
        ("12.0", "525.60.13", None),
        ("12.7", "525.60.12", "525.60.12 is too old for CUDA 12.7: install driver 525.60.13 or newer on the host"),
        ("12.8", "535.129.03", "535.129.03 is too old for CUDA 12.8: install driver 570.26 or newer on the host"),
        ("12.9", "535.129.03", "535.129.03 is too old for CUDA 12.9: install driver 570.26 or newer on the host"),
        ("12.11", "580.65.06", "580.65.06 is too old for CUDA 12.11: install driver 590.1 or newer on the host"),
        ("11.7", "440.118.02", None),  # no table
        ("13.0", "440.118.02", None),
    ],
)
def test_the_driver(cuda: str, driver: str, line: str | None) -> None:
    seen = said(replace(FIT, cuda=cuda, driver=driver, gpus=None, cards=(RTX_4090,)))
    assert seen == ([f"unfit: the NVIDIA driver {line}, or take a box that has it"] if line else [])


def test_a_driver_that_is_too_old_is_the_cause_and_no_gpu_the_effect() -> None:
    (line,) = said(replace(FIT, gpus=0, driver="440.118.02", cards=None))
    assert line.startswith("unfit: the NVIDIA driver 440.118.02 is too old")


def test_an_old_driver_with_which_pytorch_sees_the_gpu_all_the_same() -> None:
    assert said(replace(FIT, driver="440.118.02", gpus=2)) == []


# --- GPUs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (
            NO_GPU,
            "PyTorch sees no GPU, and no NVIDIA driver is loaded: take a box on which `nvidia-smi` lists a card, or "
            "install the driver",
        ),
        (
            replace(NO_GPU, driver="535.129.03"),
            "PyTorch sees no GPU, though the NVIDIA driver 535.129.03 is loaded: give the container the GPU (`docker "
            "run --gpus all`, or in "
            "compose a reservation of `driver: nvidia`; both need nvidia-container-toolkit on the host)",
        ),
        (
            replace(
                NO_GPU, driver="535.129.03", cards=(H100, H100), gpu_error="Error 802:\n system not yet initialized"
            ),
            "PyTorch sees no GPU, though nvidia-smi lists 2 cards (NVIDIA H100 80GB HBM3); it says Error 802: system "
            "not yet initialized: "
            "start the box again, or take another (on boxes with NVSwitch, nvidia-fabricmanager must run)",
        ),
        (
            replace(NO_GPU, driver="535.129.03", cards=(H100,), visible_devices="7"),
            "PyTorch sees no GPU with CUDA_VISIBLE_DEVICES=7: unset it, or name cards that `nvidia-smi -L` lists",
        ),
        (
            replace(NO_GPU, device="cuda", visible_devices=""),
            "PyTorch sees no GPU with CUDA_VISIBLE_DEVICES='': unset it, or name cards that `nvidia-smi -L` lists",
        ),
        (
            replace(NO_GPU, gpus=None, cards=()),
            "there is no GPU, and no NVIDIA driver is loaded: take a box on which `nvidia-smi` lists a card, or "
            "install the driver",
        ),
    ],
)
def test_no_gpu(facts: FitnessFacts, line: str) -> None:
    assert said(facts) == [f"unfit: {line}{ON_PURPOSE}"]


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        (FitnessFacts(device="auto", cuda="11.8"), True),
        (FitnessFacts(device="auto", cuda=None), False),  # a PyTorch for the CPU only
        (FitnessFacts(device="auto", cuda="11.8", visible_devices=""), False),
        (FitnessFacts(device="auto", cuda="11.8", visible_devices="-1"), False),
        (FitnessFacts(device="auto", cuda="11.8", visible_devices="0"), True),
        (FitnessFacts(device="cpu", cuda="11.8"), False),
        (FitnessFacts(device="cuda", cuda=None), True),
        (FitnessFacts(device="cuda", cuda="11.8", visible_devices=""), True),
    ],
)
def test_who_wants_a_gpu(facts: FitnessFacts, wanted: bool) -> None:
    assert wants_gpu(facts) is wanted


@pytest.mark.parametrize("choice", [{"device": "cpu"}, {"visible_devices": ""}, {"cuda": None}])
def test_what_runs_on_the_cpu_is_asked_for_no_gpu(choice: dict[str, str]) -> None:
    unfit = replace(NO_GPU, driver="440.118.02", cards=(RTX_5090,), shared_memory_bytes=0)
    assert said(unfit) != []
    assert said(replace(unfit, **choice)) == []  # type: ignore[arg-type]


TOO_NEW = (
    "unfit: NVIDIA GeForce RTX 5090 (compute capability 12.0) is too new for CUDA 11.8, which supports up to 9.0: "
    "take a box with an older card, or flavour cu130 of the image (docs/container.md)"
)
TOO_OLD = (
    "unfit: Tesla P100-PCIE-16GB (compute capability 6.0) is too old for this build for CUDA 11.8, which needs at "
    "least 7.0: "
    f"take a box with a newer card{ON_PURPOSE}"
)


@pytest.mark.parametrize(
    ("cuda", "cards", "lines"),
    [
        ("11.8", (H100, Gpu("Tesla V100-SXM2-32GB", "7.0")), []),
        ("11.8", (RTX_5090, RTX_5090), [TOO_NEW]),  # once
        ("11.8", (P100, H100, RTX_5090), [TOO_OLD, TOO_NEW]),
        ("11.8", (Gpu("NVIDIA B200", None),), []),
        ("12.8", (RTX_5090, P100), []),  # left to PyTorch
        ("11.7", (RTX_5090,), []),
    ],
)
def test_cards(cuda: str, cards: tuple[Gpu, ...], lines: list[str]) -> None:
    assert said(replace(FIT, cuda=cuda, driver="580.65.06", cards=cards)) == lines
    assert said(replace(FIT, cuda=cuda, driver="580.65.06", cards=cards, gpus=None)) == lines  # as the doctor sees it


# --- GPU memory -----------------------------------------------------------------------------------

RANK = "/opt/venv/bin/python -m rlhf_train.worker"
NOTEBOOK = "/usr/bin/python3 -m ipykernel_launcher -f /home/lin/.local/share/jupyter/kernel-1.json"
IN_USE = replace(FIT, gpu_used_bytes=(41_000_000, 0))
OR_WAIT = "wait for its end, or choose another card with CUDA_VISIBLE_DEVICES"
HOST = (
    f"look on the host with `nvidia-smi`: it is outside this container (or another user's, or the desktop); {OR_WAIT}"
)
LEFT_BEHIND = f"`kill 4321` if an earlier run left it behind (`kill -9 4321` if it stays); else {OR_WAIT}"


@pytest.mark.parametrize(
    ("holders", "line"),
    [
        ([Holder(0, 4321, 40_000_000, RANK)], f"by pid 4321 (python -m rlhf_train.worker, 40 MB): {LEFT_BEHIND}"),
        ([Holder(0, 4321, None, RANK)], f"by pid 4321 (python -m rlhf_train.worker): {LEFT_BEHIND}"),
        (
            [Holder(0, 77, 40_000_000, NOTEBOOK)],
            f"by pid 77 (python3 -m ipykernel_launcher -f /home/lin/.local/share/jupy..., 40 MB): {OR_WAIT}",
        ),
        (
            [
                Holder(0, 7, 20_000_000, RANK),
                Holder(0, 8, 1_000_000, "python a.py"),
                Holder(0, 9, 20_000_000, "python -m rlhf_train --job demo"),
            ],
            "by pid 7 (python -m rlhf_train.worker, 20 MB), pid 8 (python a.py, 1 MB), pid 9 (python -m rlhf_train "
            "--job demo, 20 MB): "
            f"`kill 7 9` if an earlier run left it behind (`kill -9 7 9` if it stays); else {OR_WAIT}",
        ),
        ([Holder(0, 8, 2, "a\n\x1b[2J")], f"by pid 8 (a \\x1b[2J, 2 bytes): {OR_WAIT}"),
        # Another card's is not named for this one.
        ([Holder(1, 4321, 40_000_000, RANK)], f"by no process that can be seen from here: {HOST}"),
        ([], f"by no process that can be seen from here: {HOST}"),
        ([Holder(0, 31337, 40_000_000)], f"by pid 31337 (40 MB), which cannot be seen from here: {HOST}"),
        ([Holder(0, 31337)], f"by pid 31337, which cannot be seen from here: {HOST}"),
        # In a container: the host's pid, and a process of ours that has the GPUs open.
        (
            [Holder(0, 31337, 40_000_000), Holder(None, 4321, None, RANK)],
            f"maybe by pid 4321 (python -m rlhf_train.worker): {LEFT_BEHIND}",
        ),
        # Where one is known to hold it, those that may are not named.
        (
            [Holder(None, 9, None, "python a.py"), Holder(0, 4321, 1_000_000, RANK)],
            f"by pid 4321 (python -m rlhf_train.worker, 1 MB): {LEFT_BEHIND}",
        ),
    ],
)
def test_gpu_memory_that_somebody_holds(holders: list[Holder], line: str) -> None:
    assert said(replace(IN_USE, gpu_holders=tuple(holders))) == [
        f"warning: GPU 0 has 41 MB in use before the job begins, {line}"
    ]


@pytest.mark.parametrize(
    ("visible", "named"),
    [
        (None, [0, 1, 3]),
        ("0", [0]),
        ("3, 1", [1, 3]),
        ("2", []),  # its memory is not known
        ("0,-1,1", [0]),  # CUDA reads no further
        ("13", []),
        ("GPU-1b2c3d4e", [0, 1, 3]),  # whose index is not known
    ],
)
def test_gpu_memory_of_the_cards_that_the_job_may_use(visible: str | None, named: list[int]) -> None:
    facts = replace(FIT, visible_devices=visible, gpu_used_bytes=(1_000_001, 2_000_000, None, 3_000_000, 1_000_000))
    assert [line.split(" has ")[0] for line in said(facts)] == [f"warning: GPU {index}" for index in named]


def test_gpu_memory_does_not_matter_to_a_job_on_the_cpu() -> None:
    assert (
        len(said(IN_USE)) == 1
        and said(replace(IN_USE, device="cpu")) == []
        and said(replace(IN_USE, visible_devices="")) == []
    )


# --- /dev/shm -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "free", "line"),
    [
        (2, 512 * MIB, None),
        (2, 512 * MIB - 1, "511 MiB free, and NCCL needs 512 MiB for 2 ranks: start the container with --shm-size=1g "),
        (2, 64 * MIB, "64 MiB free, and NCCL needs 512 MiB for 2 ranks: start the container with --shm-size=1g "),
        (8, 1 * GIB, "1024 MiB free, and NCCL needs 2048 MiB for 8 ranks: start the container with --shm-size=2g "),
        (5, 1 * GIB, "1024 MiB free, and NCCL needs 1280 MiB for 5 ranks: start the container with --shm-size=2g "),
        (1, 0, None),
        (None, 0, None),
    ],
)
def test_shared_memory(ranks: int | None, free: int, line: str | None) -> None:
    facts = replace(FIT, ranks=ranks, shared_memory_bytes=free)
    found = said(facts)
    assert len(found) == bool(line) and all(text.startswith(f"unfit: /dev/shm has {line}") for text in found)
    assert said(replace(facts, shared_memory_used=False)) == [] and said(replace(facts, shared_memory_bytes=None)) == []


# --- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operators", "flags", "line"),
    [
        (("cpu_adam",), ("avx2", "fma"), None),
        (("cpu_adam",), ("avx2", "fma4"), "this CPU lacks fma, for which DeepSpeed's cpu_adam was compiled"),
        (
            ("cpu_adam", "cpu_lion", "fused_adam"),
            (),
            "this CPU lacks avx2, fma, for which DeepSpeed's cpu_adam, cpu_lion was compiled",
        ),
        (("fused_adam",), (), None),
        ((), (), None),
        (("cpu_adam",), None, None),
    ],
)
def test_operators_that_this_cpu_cannot_run(
    operators: tuple[str, ...], flags: tuple[str, ...] | None, line: str | None
) -> None:
    found = said(replace(FIT, prebuilt_operators=operators, cpu_flags=flags))
    advice = "take a box with a newer CPU before you offload the optimizer to it; all else runs"
    assert found == ([f"warning: {line}: {advice}"] if line else [])


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ({"uid": 0}, None),  # another's, but we may write
        (
            {"uid": 0, "writable": False},
            "runs/demo belongs to uid 0, and uid 1000 may not write to it: sudo chown -R 1000:100 runs/demo",
        ),
        ({"uid": 1000, "writable": False}, "runs/demo is write-protected: chmod -R u+rwX runs/demo"),
        (
            {"found": ".", "missing": "runs", "uid": 0, "writable": False},
            ". belongs to uid 0, and uid 1000 may not write to it: sudo mkdir -p runs/demo && sudo chown -R "
            "1000:100 runs",
        ),
        ({"found": ".", "missing": "runs", "writable": False}, ". is write-protected: chmod -R u+rwX ."),
        (
            {"found": "runs/demo/events.jsonl", "uid": 0, "writable": False},
            "runs/demo/events.jsonl belongs to uid 0, and uid 1000 may not write to it: sudo chown -R 1000:100 "
            "runs/demo",
        ),
        (
            {"path": "my runs/x", "found": "my runs/x", "uid": 0, "writable": False},
            "'my runs/x' belongs to uid 0, and uid 1000 may not write to it: sudo chown -R 1000:100 'my runs/x'",
        ),
        (
            {"found": "file", "missing": "file/runs", "path": "file/runs", "is_folder": False},
            "the folder file/runs cannot be made, since file is a file: choose another --output-dir, or mend the path",
        ),
        (
            {"read_only": True, "writable": False, "uid": 0},
            "runs/demo is on a read-only file system: mount it writable, or choose another --output-dir, or mend "
            "the path",
        ),
        (
            {"writable": False, "uid": None},
            "runs/demo cannot be written: choose another --output-dir, or mend the path",
        ),
    ],
)
def test_a_folder_that_cannot_be_written(folder: dict[str, object], line: str | None) -> None:
    facts = replace(FIT, folders=(replace(OURS, **folder),))  # type: ignore[arg-type]
    assert said(facts) == ([f"unfit: {line}"] if line else [])


@pytest.mark.parametrize(
    ("folder", "pretrained", "lines"),
    [
        ({"free_bytes": 5_000_000}, True, []),
        (
            {"free_bytes": 4_999_999},
            True,
            [
                "warning: only 5 MB are free at runs/demo, and a run of OPT-1.3b writes about 5 MB: "
                "see what this job needs with --dry-run, and make room"
            ],
        ),
        ({"free_bytes": 1_000_000}, False, []),
        (
            {"free_bytes": 900_000},
            True,
            [
                "unfit: 900 kB are free at runs/demo, and a run needs 1 MB at least: make room, or choose an "
                "--output-dir on a larger disk"
            ],
        ),
        ({"free_bytes": None, "free_inodes": None}, True, []),
        (
            {"free_inodes": 99, "found": "/a b"},
            True,
            [
                "unfit: 99 inodes are free at '/a b', and a run needs 100 at least: remove many small files (`df -i` "
                "and `du --inodes` show "
                "where), or choose an --output-dir on another disk"
            ],
        ),
    ],
)
def test_a_disk_that_is_nearly_full(folder: dict[str, object], pretrained: bool, lines: list[str]) -> None:
    facts = replace(FIT, pretrained=pretrained, folders=(replace(OURS, **folder),))  # type: ignore[arg-type]
    assert said(facts) == lines


@pytest.mark.parametrize(
    ("free", "lines"),
    [
        (None, []),
        (3_000_000, []),
        (
            2_999_999,
            [
                "warning: only 3 MB are free at '/a b', where models of the hub are kept, and those of OPT-1.3b have "
                "about 3 MB: "
                "make room, or choose another HF_HOME"
            ],
        ),
    ],
)
def test_a_disk_of_the_hubs_files_that_is_nearly_full(free: int | None, lines: list[str]) -> None:
    assert said(replace(FIT, hub_cache=Folder("/a b/hub", "/a b", free_bytes=free))) == lines


# --- all together ---------------------------------------------------------------------------------


def test_all_findings_come_together_a_line_each() -> None:
    full = replace(OURS, free_bytes=0, free_inodes=0)
    foreign = replace(OURS, path="cache\n\x1b[2J", found="cache\n\x1b[2J", uid=0, writable=False)
    facts = replace(FIT, cards=(RTX_5090,), shared_memory_bytes=0, cpu_flags=(), folders=(full, foreign))
    findings = judge(facts, LIMITS)
    assert [finding.level for finding in findings] == ["unfit", "unfit", "warning", "unfit", "unfit", "unfit"]
    error = error_of(findings)
    assert error is not None and (error.what, error.exit_code, error.hint) == (
        "this machine is not fit for the job",
        ExitCode.UNFIT,
        "",
    )
    lines = error.why.split("\n")
    assert [line.split()[0] for line in lines] == ["NVIDIA", "/dev/shm", "0", "0", "'cache"] and "\x1b" not in error.why


def test_warnings_alone_are_no_error() -> None:
    assert error_of([Finding("warning", "a", "b")]) is None and error_of([]) is None


def test_facts_travel_as_json() -> None:
    again = json.loads(json.dumps(asdict(replace(FIT, gpu_holders=(Holder(0, 7, 1_000_000, "python"),)))))
    again["cards"] = tuple(Gpu(**card) for card in again["cards"])
    again["gpu_holders"] = tuple(Holder(**holder) for holder in again["gpu_holders"])
    again["folders"] = tuple(Folder(**folder) for folder in again["folders"])
    assert said(FitnessFacts(**again)) == [] and again["driver"] == "450.80.02"


# --- peer access ----------------------------------------------------------------------------------

RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", "8.6")


@pytest.mark.parametrize(
    ("cards", "peer_access", "driver", "why"),
    [
        ((RTX_3090, RTX_3090), False, "535.129.03", "NVIDIA GeForce RTX 3090 has no peer access here"),
        ((RTX_3090, RTX_3090), True, "535.129.03", ""),  # NVLink
        ((RTX_4090, RTX_4090), False, "550.54.15", "NVIDIA GeForce RTX 4090 has no peer access here"),
        (
            (RTX_4090, RTX_4090),
            True,
            "550.40.06",
            "the peer access that driver 550.40.06 offers on NVIDIA GeForce RTX 4090 does not work",
        ),
        (
            (RTX_4090, RTX_4090),
            True,
            None,
            "the peer access that driver unknown offers on NVIDIA GeForce RTX 4090 does not work",
        ),
        ((RTX_4090, RTX_4090), True, "550.40.07", ""),
        ((Gpu("NVIDIA A10", "8.6"),) * 2, False, "535.129.03", ""),  # NCCL finds out by itself
        ((Gpu("NVIDIA RTX 4000 Ada Generation", "8.9"),) * 2, True, "535.129.03", ""),
        ((RTX_3090,), None, "535.129.03", ""),
        (None, None, None, ""),
    ],
)
def test_geforce_cards_without_peer_access(
    cards: tuple[Gpu, ...] | None, peer_access: bool | None, driver: str | None, why: str
) -> None:
    assert no_peer_access(replace(FIT, cards=cards, peer_access=peer_access, driver=driver), LIMITS) == why


def test_a_copy_that_arrived_changed_is_reason_enough() -> None:
    facts = replace(FIT, cards=(H100, H100), peer_copies_wrong=True)
    assert no_peer_access(facts, LIMITS) == "what one GPU writes into another's memory arrives changed"


def test_versions_compare_by_number() -> None:
    assert version("450.80.02") == (450, 80, 2) and version("12.10") > version("12.8")
