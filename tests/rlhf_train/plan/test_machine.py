from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from env.settings import Limits
from jobs.fitness import FitnessFacts, Folder, Gpu, Holder, judge
from jobs.run_dir import RunDir
from jobs.spec import Job, load_job
from rlhf_train import host
from rlhf_train.data import hub
from rlhf_train.plan import machine
from rlhf_train.plan.placement import Machine

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, which needs root")
OTHER = 4242  # a uid that nobody has


# --- texts ---


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (nixbld@)\n"
            "GCC version:  gcc version 15.3.0 (GCC)\n",
            "580.159.04",
        ),  # taken from a box with an H200
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  515.65.01  Wed Mar 16 11:24:05 UTC 2022\n"
            "GCC version:  gcc version 12.2.0 (GCC)\n",
            "515.65.01",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  384.81  Wed Aug 17 22:24:07 PDT 2016\n", "384.81"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module 390.48 Thu Mar 22 00:42:57 PDT 2018\n", "390.48"),
        ("GCC version:  gcc version 12.2.0 (GCC)\n", None),
        ("", None),
    ],
)
def test_driver_version(text: str, driver: str | None) -> None:
    assert machine.driver_version(text) == driver


@pytest.mark.parametrize(
    ("text", "driver", "cards"),
    [
        ("580.159.04, NVIDIA H200, 9.0\n", "580.159.04", [Gpu("NVIDIA H200", "9.0")]),
        (
            "535.129.03, NVIDIA GeForce RTX 4090, 8.9\n535.129.03, NVIDIA GeForce RTX 3090, 8.6\n",
            "535.129.03",
            [Gpu("NVIDIA GeForce RTX 4090", "8.9"), Gpu("NVIDIA GeForce RTX 3090", "8.6")],
        ),
        ("440.118.02, Tesla V100-SXM2-32GB\n", "440.118.02", [Gpu("Tesla V100-SXM2-32GB")]),
        ("470.256.02, Tesla K80, [N/A]\n", "470.256.02", [Gpu("Tesla K80")]),
        ("580.65.06, NVIDIA GeForce RTX 5090, 12.0\r\n", "580.65.06", [Gpu("NVIDIA GeForce RTX 5090", "12.0")]),
        ("No devices were found\n", None, []),
        ("", None, []),
    ],
)
def test_listed_cards(text: str, driver: str | None, cards: list[Gpu]) -> None:
    assert machine.listed_cards(text) == (driver, tuple(cards))


@pytest.mark.parametrize(
    ("text", "indexes", "used"),
    [
        ("0, GPU-1b-2c, 4\n", {"GPU-1b-2c": 0}, (4_194_304,)),
        ("1, GPU-b, 40960\r\n0, GPU-a, 0\r\n", {"GPU-a": 0, "GPU-b": 1}, (0, 42_949_672_960)),
        (
            "0, GPU-a, [N/A]\n1, GPU-b, [Insufficient Permissions]\n2, GPU-c, 1\n",
            {"GPU-a": 0, "GPU-b": 1, "GPU-c": 2},
            (None, None, 1_048_576),
        ),
        ("0, GPU-a, 1\n2, GPU-c, 2\n", {"GPU-a": 0, "GPU-c": 2}, (1_048_576, None, 2_097_152)),  # each at its index
        ("No devices were found\n", {}, ()),
        ("", {}, ()),
    ],
)
def test_cards_in_use(text: str, indexes: dict[str, int], used: tuple[int | None, ...]) -> None:
    assert machine.cards_in_use(text) == (indexes, used)


@pytest.mark.parametrize(
    ("text", "holders"),
    [
        ("GPU-b, 4321, 1024\nGPU-a, 77, 1\n", [Holder(1, 4321, 1_073_741_824), Holder(0, 77, 1_048_576)]),
        ("GPU-a, 4321, [N/A]\r\nGPU-a, 77, [Not Found]\r\n", [Holder(0, 4321), Holder(0, 77)]),
        ("GPU-else, 4321, 1024\n", [Holder(None, 4321, 1_073_741_824)]),
        (
            "GPU-a, [N/A], 1024\n[N/A], 4321, 1\n",
            [Holder(None, 4321, 1_048_576)],
        ),  # without a pid no process can be named
        ("No running processes found\n", []),
        ("", []),
    ],
)
def test_listed_holders(text: str, holders: list[Holder]) -> None:
    assert machine.listed_holders(text, {"GPU-a": 0, "GPU-b": 1}) == holders


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (
            "processor\t: 0\nmodel name\t: A\nflags\t\t: fpu avx2 fma\nbugs\t\t: x\n\nprocessor\t: 1\nflags\t\t: fpu\n",
            ("fpu", "avx2", "fma"),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd\n", None),  # aarch64
        ("vmx flags\t: vnmi\n", None),
        ("", None),
    ],
)
def test_cpu_flags(text: str, flags: tuple[str, ...] | None) -> None:
    assert host.cpu_flags(text) == flags


# --- nvidia-smi ---


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """The only program on PATH."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


OLD = """case "$1" in *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2 ;; esac
echo '440.118.02, Tesla V100-SXM2-32GB'"""


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo '580.159.04, NVIDIA H200, 9.0'", ("580.159.04", (Gpu("NVIDIA H200", "9.0"),))),
        (OLD, ("440.118.02", (Gpu("Tesla V100-SXM2-32GB"),))),
        ("echo 'No devices were found'", (None, ())),
        ('echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."; exit 9', (None, None)),
        ('[ "$#" = 2 ] && [ "$2" = --format=csv,noheader ] && echo "1.2, A, 3.4"', ("1.2", (Gpu("A", "3.4"),))),
        ("printf '1.2, \\377, 3.4\\n'", ("1.2", (Gpu("�", "3.4"),))),
    ],
)
def test_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: object) -> None:
    nvidia_smi(tmp_path, monkeypatch, script)
    assert machine.nvidia_smi() == found


def test_nvidia_smi_that_is_not_there_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "while :; do :; done")
    monkeypatch.setattr(machine, "NVIDIA_SMI_S", 0.2)
    assert machine.nvidia_smi() == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_smi() == (None, None)


@pytest.fixture
def left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Return the pid of a process that has a card (a file in its place) open, like this one."""
    card = tmp_path / "nvidia0"
    card.touch()
    monkeypatch.setattr(machine, "GPU_FILE", re.compile(re.escape(str(card.resolve()))))
    # The file is its stdin, so that it is open from the start.
    with (
        card.open() as file,
        subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)", "--left behind"], stdin=file
        ) as process,
    ):
        try:
            yield process.pid
        finally:
            process.kill()


SLEEPS = f"{sys.executable} -c import time; time.sleep(600) --left behind"
TWO_CARDS = """[ "$#" = 2 ] && [ "$2" = --format=csv,noheader,nounits ] || exit 1
case "$1" in
    --query-gpu=index,uuid,memory.used) echo '0, GPU-a, 1'; echo '1, GPU-b, 2' ;;
    --query-compute-apps=gpu_uuid,pid,used_memory) {apps} ;;
    *) exit 1 ;;
esac"""
NOBODY = 2**22 + 1  # above the highest pid that Linux gives


@pytest.mark.parametrize(
    ("apps", "holders"),
    [
        ("echo 'GPU-b, {pid}, 2'", [Holder(1, 1, 2 * 2**20, SLEEPS)]),
        ("echo 'GPU-b, {pid}, 2'; echo 'GPU-a, {us}, 1'", [Holder(1, 1, 2 * 2**20, SLEEPS)]),
        ("echo 'GPU-b, {nobody}, 2'", [Holder(1, NOBODY, 2 * 2**20), Holder(None, 1, None, SLEEPS)]),  # the host's pid
        (":", [Holder(None, 1, None, SLEEPS)]),
        ("echo 'GPU-b, {pid}, 2'; exit 6", [Holder(None, 1, None, SLEEPS)]),
    ],
)
def test_who_holds_gpu_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: int, apps: str, holders: list[Holder]
) -> None:
    nvidia_smi(
        tmp_path, monkeypatch, TWO_CARDS.format(apps=apps.format(pid=left_behind, us=os.getpid(), nobody=NOBODY))
    )
    wanted = tuple(replace(holder, pid=left_behind) if holder.pid == 1 else holder for holder in holders)
    assert machine.gpu_memory() == ((2**20, 2 * 2**20), wanted)


@pytest.mark.parametrize("script", ["echo '0, GPU-a, 1'; exit 9", "while :; do :; done"])
def test_gpu_memory_of_which_nvidia_smi_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    nvidia_smi(tmp_path, monkeypatch, script)
    monkeypatch.setattr(machine, "NVIDIA_SMI_S", 0.2)
    assert machine.gpu_memory() == (None, ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu_memory() == (None, ())


def test_the_files_of_cards() -> None:
    names = ("/dev/nvidia0", "/dev/nvidia15", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/null", "/mnt/dev/nvidia0")
    assert [name for name in names if machine.GPU_FILE.fullmatch(name)] == ["/dev/nvidia0", "/dev/nvidia15"]


# --- DeepSpeed's operators ---


def test_prebuilt_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "deepspeed"
    for name in (
        "ops/adam/cpu_adam_op.cpython-310-x86_64-linux-gnu.so",
        "ops/adam/fused_adam_op.so",
        "ops/adam/cpu_adam.py",
        "lib/other_op.so",
    ):
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (package / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.prebuilt_operators() == ("cpu_adam", "fused_adam")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nothing")])
    assert machine.prebuilt_operators() == ()


# --- folders ---


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    found = machine.folder(tmp_path)
    assert (found.path, found.found, found.missing) == (str(tmp_path), str(tmp_path), "")
    assert (found.is_folder, found.writable, found.read_only, found.uid) == (True, True, False, os.geteuid())
    room = os.statvfs(tmp_path)
    assert found.free_bytes is not None
    assert abs(found.free_bytes - room.f_bavail * room.f_frsize) < 2**30  # others write, too


@pytest.mark.parametrize(
    ("path", "found", "missing", "is_folder"),
    [
        ("runs/demo", ".", "runs", True),
        ("a/b/c", "a", "a/b", True),
        ("a/../d", "a/..", "a/../d", True),
        ("file/runs/demo", "file", "file/runs", False),
    ],
)
def test_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, found: str, missing: str, is_folder: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("file").touch()
    seen = machine.folder(Path(path))
    assert (seen.path, seen.found, seen.missing, seen.is_folder) == (path, found, missing, is_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path / ("n" * 300), loop / "runs"):
        assert machine.folder(path).writable is False


@pytest.mark.parametrize(("files", "known"), [(0, False), (1000, True)])
def test_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, known: bool) -> None:
    """Btrfs says that it has none at all."""
    real = os.statvfs(tmp_path)
    values = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    monkeypatch.setattr(machine.os, "statvfs", lambda _: type("Room", (), values | {"f_files": files, "f_favail": 7}))
    assert machine.folder(tmp_path).free_inodes == (7 if known else None)


AS_OTHER = f"""
import os, sys
from pathlib import Path
from rlhf_train.plan import machine  # before the privileges go: torch may lie where only root may read
os.setgid({OTHER}); os.setuid({OTHER})
from env.settings import Limits
from jobs.fitness import FitnessFacts, judge
found = machine.run_folder(Path(sys.argv[1]))
facts = FitnessFacts(uid=os.geteuid(), gid=os.getegid(), folders=(found,))
for finding in judge(facts, Limits.load()):
    print(finding)
"""


def as_other(cwd: Path, path: str) -> list[str]:
    checkout = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", AS_OTHER, path],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": checkout},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_root
def test_a_folder_of_another_user(tmp_path: Path) -> None:
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "events.jsonl").touch()
    assert as_other(tmp_path, "runs/demo") == [
        f"runs/demo belongs to uid 0, and uid {OTHER} may not write to it: sudo chown -R {OTHER}:{OTHER} runs/demo"
    ]
    assert as_other(tmp_path, "runs/new") == [
        f"runs belongs to uid 0, and uid {OTHER} may not write to it: sudo chown -R {OTHER}:{OTHER} runs"
    ]
    assert as_other(tmp_path, "out/new") == [
        f". belongs to uid 0, and uid {OTHER} may not write to it: "
        f"sudo mkdir -p out && sudo chown -R {OTHER}:{OTHER} out"
    ]
    os.chown(tmp_path / "runs" / "demo", OTHER, OTHER)
    assert as_other(tmp_path, "runs/demo") == [
        f"runs/demo/events.jsonl belongs to uid 0, and uid {OTHER} may not write to it: "
        f"sudo chown -R {OTHER}:{OTHER} runs/demo"
    ]
    os.chown(tmp_path / "runs" / "demo" / "events.jsonl", OTHER, OTHER)
    assert as_other(tmp_path, "runs/demo") == []
    (tmp_path / "runs" / "demo").chmod(0o555)
    assert as_other(tmp_path, "runs/demo") == ["runs/demo is write-protected: chmod -R u+rwX runs/demo"]
    (tmp_path / "runs").chmod(0o700)
    assert as_other(tmp_path, "runs/demo") == ["runs cannot be written: choose another --output-dir, or mend the path"]


@needs_root
def test_root_may_write_to_anybodys_folder(tmp_path: Path) -> None:
    os.chown(tmp_path, OTHER, OTHER)
    tmp_path.chmod(0o755)
    seen = machine.run_folder(tmp_path)
    assert (seen.uid, seen.writable) == (OTHER, True)


# --- all ---


def facts(job: Job, seen: Machine, environ: dict[str, str] | None = None) -> FitnessFacts:
    return machine.facts_of(job, RunDir(Path("runs/x")), Path("cache"), seen, environ or {})


@pytest.fixture
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """-> where /proc/driver/nvidia/version would lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(machine, "nvidia_smi", lambda: (None, None))
    monkeypatch.setattr(machine, "gpu_memory", lambda: (None, ()))
    return tmp_path / "version"


TWO = Machine(
    cores=8,
    gpus=("NVIDIA GeForce RTX 4090", "NVIDIA H100"),
    gpu_bytes=1,
    capabilities=("8.9", "9.0"),
    peer_access=False,
    cuda="11.8",
)


def test_gpus_that_pytorch_sees(no_driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  515.65.01  Wed Mar 16 11:24:05 UTC 2022\n", encoding="utf-8"
    )
    monkeypatch.setattr(machine, "nvidia_smi", lambda: pytest.fail("not needed, and slow"))
    seen = facts(load_job("opt-1.3b"), TWO, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert (seen.device, seen.cuda, seen.gpus, seen.ranks, seen.pretrained) == ("auto", "11.8", 2, 2, True)
    assert (seen.driver, seen.peer_access, seen.visible_devices, seen.shared_memory_used) == (
        "515.65.01",
        False,
        "0,1",
        True,
    )
    assert seen.cards == (Gpu("NVIDIA GeForce RTX 4090", "8.9"), Gpu("NVIDIA H100", "9.0"))
    assert [(folder.path, folder.missing) for folder in seen.folders] == [("runs", "runs"), ("cache", "cache")]
    assert seen.folders[0].free_bytes and seen.folders[1].free_bytes is None and seen.folders[1].free_inodes is None
    room = os.statvfs("/dev/shm")
    assert seen.shared_memory_bytes is not None and 0 <= seen.shared_memory_bytes <= room.f_blocks * room.f_frsize
    assert (seen.uid, seen.gid) == (os.geteuid(), os.getegid())
    assert (seen.gpu_used_bytes, seen.gpu_holders) == (None, ())


def test_memory_of_gpus_in_use(no_driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = ((7, None), (Holder(0, 4321, 7, "python"),))
    monkeypatch.setattr(machine, "gpu_memory", lambda: held)
    seen = facts(load_job("opt-1.3b"), TWO)
    assert (seen.gpu_used_bytes, seen.gpu_holders) == held
    monkeypatch.setattr(
        machine, "gpu_memory", lambda: pytest.fail("nvidia-smi is asked again, though it said nothing of the cards")
    )
    assert facts(load_job("opt-1.3b"), Machine(cores=1, cuda="11.8")).gpu_used_bytes is None


@pytest.mark.parametrize(
    ("environ", "used"), [({}, True), ({"NCCL_SHM_DISABLE": "0"}, True), ({"NCCL_SHM_DISABLE": "1"}, False)]
)
def test_ranks_and_nccls_shared_memory(no_driver: Path, environ: dict[str, str], used: bool) -> None:
    seen = facts(load_job("opt-1.3b", ["hardware.ranks=7"]), TWO, environ)
    assert (seen.ranks, seen.shared_memory_used) == (7, used)


@pytest.mark.parametrize(
    ("proc", "smi", "driver", "cards"),
    [
        (None, (None, None), None, None),
        ("535.1", (None, None), "535.1", None),
        ("535.1", ("536.1", (Gpu("A", "8.0"),)), "535.1", (Gpu("A", "8.0"),)),
        (None, ("536.1", (Gpu("A", "8.0"),)), "536.1", (Gpu("A", "8.0"),)),
    ],
)
def test_gpus_that_pytorch_does_not_see(
    no_driver: Path, monkeypatch: pytest.MonkeyPatch, proc: str | None, smi: Any, driver: str | None, cards: Any
) -> None:
    if proc:
        no_driver.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {proc}  Wed\n", encoding="utf-8")
    monkeypatch.setattr(machine, "nvidia_smi", lambda: smi)
    seen = facts(load_job("opt-1.3b"), Machine(cores=1, cuda="11.8", gpu_error="because"))
    assert (seen.gpus, seen.gpu_error, seen.driver, seen.cards) == (0, "because", driver, cards)


@pytest.mark.parametrize(
    ("settings", "cuda", "environ"),
    [(["hardware.device=cpu"], "11.8", {}), ([], None, {}), ([], "11.8", {"CUDA_VISIBLE_DEVICES": ""})],
)
def test_a_job_for_the_cpu_asks_nothing_of_gpus(
    no_driver: Path, monkeypatch: pytest.MonkeyPatch, settings: Sequence[str], cuda: str | None, environ: dict[str, str]
) -> None:
    monkeypatch.setattr(machine, "nvidia_smi", lambda: pytest.fail("asked"))
    monkeypatch.setattr(machine, "gpu_memory", lambda: pytest.fail("asked"))
    no_driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  515.65.01  Wed\n", encoding="utf-8")
    seen = facts(load_job("opt-1.3b", settings), Machine(cores=1, cuda=cuda), environ)
    assert (seen.gpus, seen.driver, seen.cards, seen.shared_memory_bytes) == (None, None, None, None)


SCRATCH = "{config: {model_type: opt}}"


@pytest.mark.parametrize(
    ("actor", "critic", "pretrained"),
    [
        ("a/b", "a/b", True),
        (SCRATCH, "actor", False),
        (SCRATCH, SCRATCH, False),
        (SCRATCH, "a/b", True),
        ("a/b", "actor", True),
        ("a/b", SCRATCH, True),
    ],
)
def test_a_job_that_names_a_model(no_driver: Path, actor: str, critic: str, pretrained: bool) -> None:
    job = load_job("demo", [f"actor.model={actor}", f"critic.model={critic}"])
    assert facts(job, Machine(cores=1)).pretrained is pretrained


@pytest.fixture
def other_disk() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=machine.SHARED_MEMORY))
    yield folder
    shutil.rmtree(folder)


def test_the_disk_of_the_hubs_files(
    no_driver: Path, tmp_path: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(model: str, critic: str = "actor") -> Folder | None:
        return facts(load_job("demo", [f"actor.model={model}", f"critic.model={critic}"]), Machine(cores=1)).hub_cache

    (tmp_path / "here").mkdir()
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert seen("a/b") is None  # the run's own disk
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(other_disk / "hub"))
    assert seen(SCRATCH) is None and seen("./here") is None  # nothing to fetch
    found = seen("a/b")
    assert found is not None and found.free_bytes
    assert (found.path, found.found) == (str(other_disk / "hub"), str(other_disk))

    store = other_disk / "hub/models--a--b"
    for file in ("refs/main", "snapshots/c0ffee/config.json", "snapshots/c0ffee/model.safetensors"):
        assert seen("a/b") is not None
        (store / file).parent.mkdir(parents=True, exist_ok=True)
        (store / file).write_text("c0ffee", encoding="utf-8")
    assert seen("a/b") is None and seen("a/b", "a/c") is not None and seen(SCRATCH, "a/b") is None
    hub._keep(store, hub.Memory(commit="c0ffee", files=["config.json", "model-1.safetensors", "model-2.safetensors"]))
    assert seen("a/b") is not None  # the download had not ended


def test_this_machine_is_fit_for_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = facts(load_job("demo"), Machine.look(gpus=False), dict(os.environ))
    assert [finding for finding in judge(seen, Limits.load()) if finding.level == "unfit"] == []
    assert list(tmp_path.iterdir()) == []
