"""The real probe.sh, under the shells that boxes have, on the real system.

Fakes stand only for what cannot be here: a GPU, Docker's GPU runtime, a provider.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from env.settings import Provider
from remote.scripts import script
from remote.ssh import commands
from remote.survey.facts import PROBE_S, BoxFacts, HubRoute, Peer, parse, place_of, probe_args, provider_of, runtime_of
from tests.shells import login_shell

PROVIDERS = Provider.load_all()
SHELLS = [shell for shell in (["dash"], ["bash", "--posix"], ["busybox", "sh"]) if shutil.which(shell[0])] or [["sh"]]

# Recorded: drivers 535 (RTX 4090) and 550 (H100); RTX 5090 as drivers from 570 on say it.
GPU = {
    "RTX 4090": "{i}, GPU-4090-{i}, 00000000:0{i}:00.0, 24564, 1, 0, 535.129.03, NVIDIA GeForce RTX 4090",
    "H100": "{i}, GPU-h100-{i}, 00000000:6{i}:00.0, 81559, 40961, 98, 550.54.15, NVIDIA H100 80GB HBM3",
}
SMI = """#!/bin/sh
# nvidia-smi
case "$*" in
    -L) echo 'GPU 0: A (UUID: GPU-0)'; echo 'GPU 1: A (UUID: GPU-1)' ;;
    *memory.total*) cat "$FAKE/gpu" ;;
    *compute_cap*) cat "$FAKE/capability" ;;
    *ecc.errors*) cat "$FAKE/ecc" ;;
    *compute-apps*) cat "$FAKE/apps" ;;
    'topo -m')
        printf '\\t\\033[4mGPU0\\tGPU1\\tCPU Affinity\\033[0m\\n'
        printf 'GPU0\\t X \\tSYS\\t0-15\\nGPU1\\tSYS\\t X \\t0-15\\n\\nLegend:\\n\\n  X    = Self\\n'
        ;;
esac
"""
DOCKER = """#!/bin/sh
case "$1 $2" in
    '--version ') echo 'Docker version 27.3.1, build ce12230' ;;
    'info --format') echo 'WARNING: No swap limit support' >&2
        echo '27.3.1|runc|io.containerd.runc.v2 nvidia runc |/var/lib/docker' ;;
    'compose version') echo 2.29.7 ;;
    'buildx version') echo 'github.com/docker/buildx v0.17.1 257815a' ;;
    'image ls') echo 'ubuntu:22.04'; echo '<none>:<none>'; echo 'rlhf-box:cu118' ;;
    'run --rm') echo "$*" >"$FAKE/run"; cat "$FAKE/gpus"; exit "$(cat "$FAKE/code")" ;;
esac
"""
NO_DOCKER = "#!/bin/sh\nexit 127\n"


class Fakes:
    """A folder of commands that come first in PATH, and one of the files they read."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.files, self.home = folder / "bin", folder / "files", folder / "home"
        for each in (self.bin, self.files, self.home):
            each.mkdir()
        self.command("docker", NO_DOCKER)
        self.command("dmesg", "#!/bin/sh\nexit 1\n")

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def file(self, name: str, text: str) -> None:
        (self.files / name).write_text(text, encoding="utf-8")

    def cards(self, *lines: str, capability: str = "8.9", ecc: str = "[N/A], [N/A]", apps: str = "") -> None:
        self.command("nvidia-smi", SMI)
        self.file("gpu", "".join(f"{line}\n" for line in lines))
        self.file("capability", "".join(f"{', '.join(line.split(', ')[:2])}, {capability}\n" for line in lines))
        self.file("ecc", "".join(f"{line.split(', ')[0]}, {ecc}\n" for line in lines))
        self.file("apps", apps)

    @property
    def environ(self) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "FAKE": str(self.files),
            "OMP_NUM_THREADS": "1",
        }


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


def ask(fakes: Fakes, *args: str, shell: list[str] | None = None, **environ: str) -> BoxFacts:
    """Run the probe as BoxConnection does."""
    words = commands.with_script(commands.sh_script(*args), script("probe.sh"))[1:]
    done = subprocess.run(
        [*(shell or SHELLS[0]), *words],
        stdin=subprocess.DEVNULL,
        env={**fakes.environ, **environ},
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert done.stderr == b"", done.stderr
    return parse(done.stdout)


@pytest.fixture(params=["dash", "bash", "busybox", "busybox-static"])
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    words = login_shell(request.param, tmp_path_factory.getbasetemp() / request.param)
    return [*words, "--posix"] if request.param == "bash" else words


# --- the machine as it is -------------------------------------------------------------------------


def test_this_machine(fakes: Fakes, shell: list[str]) -> None:
    before = time.time()
    facts = ask(fakes, *probe_args(PROVIDERS, hub=""), shell=shell)
    assert facts.complete and facts.elapsed_s is not None
    assert facts.clock is not None and before - 1 <= facts.clock <= time.time() + 1
    assert (facts.uid, facts.gid, facts.machine, facts.home) == (
        os.getuid(),
        os.getgid(),
        os.uname().machine,
        str(fakes.home),
    )
    assert (
        facts.hostname == os.uname().nodename
        and facts.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    )
    assert facts.cores is not None and 0 < facts.cores <= len(os.sched_getaffinity(0))
    assert (
        facts.cores > 1 or len(os.sched_getaffinity(0)) == 1 or Path("/sys/fs/cgroup/cpu.max").exists()
    )  # not OMP_NUM_THREADS
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert facts.memory_bytes is not None and 0 < facts.memory_bytes <= pages
    assert facts.shm_bytes == os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    assert facts.tools is not None and facts.tools["tar"] and facts.cpu_flags
    home = place_of(facts, PROVIDERS["generic"])
    room = os.statvfs(fakes.home)
    assert (home.root, home.found, home.missing) == (
        f"{fakes.home}/rlhf-box",
        str(fakes.home),
        f"{fakes.home}/rlhf-box",
    )
    assert (home.writable, home.is_folder, home.read_only, home.uid) == (True, True, False, os.getuid())
    assert home.free_bytes is not None and 0 < home.free_bytes < room.f_blocks * room.f_frsize and home.file_system
    assert (
        any(python.version.startswith("3.") for python in facts.pythons) or "python" in facts.late
    )  # of a machine that is very busy
    assert facts.docker.server == "" and runtime_of(facts).name == "bare"


def test_nothing_is_left_behind(fakes: Fakes, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    ask(fakes, "root=$HOME/rlhf-box", TMPDIR=str(scratch))
    assert list(scratch.iterdir()) == [] and list(fakes.home.iterdir()) == []


def test_no_value_of_the_environment_is_said(fakes: Fakes) -> None:
    facts = ask(fakes, HF_TOKEN="hf_secret\nSECOND_LINE=hf_other\nhf_third", ODD="a=b")
    assert {"HF_TOKEN", "ODD"} <= facts.variables and not any(
        "hf_" in name or name == "SECOND_LINE" for name in facts.variables
    )


@pytest.mark.parametrize("name", ["with blank", "a|bar", "$(touch pwned)", "quote'\"", "-n", "*", "line\nbreak"])
def test_hostile_names(fakes: Fakes, name: str) -> None:
    root = fakes.home / name / "rlhf-box"
    root.mkdir(parents=True)
    (root / "deployed").write_text("code 3f2a\nruntime bare\n")
    facts = ask(fakes, f"root={root}")
    (place,) = facts.places
    assert place.found == place.root == str(root).replace("\n", " ") and place.missing == "" and place.writable
    assert place.deployed == {"code": "3f2a", "runtime": "bare"}
    assert not list(fakes.home.rglob("pwned"))


# --- what is there of ours ------------------------------------------------------------------------


def test_what_is_deployed_and_what_runs(fakes: Fakes) -> None:
    sleeper = subprocess.Popen(["sleep", "30"])
    try:
        for root, start in (("a", "own"), ("b", "1")):
            (fakes.home / root / "slot").mkdir(parents=True)
            (fakes.home / root / ".rlhf-box").touch()
            (fakes.home / root / "deployed").write_text("code abc\nenv 12 34\n")
            stat = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(") ")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()
            slot = {
                "run": "ppo|1",
                "request": "r1",
                "pid": str(sleeper.pid),
                "start": stat[19] if start == "own" else start,
                "boot": boot,
            }
            for name, value in slot.items():
                (fakes.home / root / "slot" / name).write_text(value)
        alive, stale, empty = ask(fakes, "root=$HOME/a", "root=$HOME/b", "root=$HOME/c").places
    finally:
        sleeper.kill()
        sleeper.wait()
    assert alive.marked and alive.deployed == {"code": "abc", "env": "12 34"} and alive.slot_alive
    assert alive.slot is not None and alive.slot["run"].replace("|", " ") == "ppo 1"
    assert stale.slot is not None and not stale.slot_alive
    assert (empty.marked, empty.deployed, empty.slot, empty.slot_alive) == (False, None, None, False)


# --- providers and limits of containers -----------------------------------------------------------


def system(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return f"under={folder}"


def test_autodl(fakes: Fakes, tmp_path: Path) -> None:
    files = {
        "proc/sys/kernel/hostname": "autodl-container-a1b2c3-4d5e\n",
        "etc/network_turbo": "export https_proxy=http://127.0.0.1:1\n",
    }
    facts = ask(fakes, system(tmp_path / "sys", files), *probe_args(PROVIDERS, hub=""))
    assert "/etc/network_turbo" in facts.files and provider_of(facts, PROVIDERS).name == "autodl"


@pytest.mark.parametrize(
    ("name", "provider"), [("RUNPOD_POD_ID", "runpod"), ("VAST_CONTAINERLABEL", "vast"), ("OTHER", "generic")]
)
def test_variables_of_process_1(fakes: Fakes, tmp_path: Path, name: str, provider: str) -> None:
    under = system(
        tmp_path / "sys", {"proc/1/environ": f"A=x\0{name}=secret\n\0", "proc/1/cgroup": "0::/kubepods/besteffort\n"}
    )
    facts = ask(fakes, under, *probe_args(PROVIDERS, hub=""))
    assert provider_of(facts, PROVIDERS).name == provider and facts.container and facts.variables == {"A", name}


MEMINFO = "MemTotal:       65536000 kB\nMemFree: 1 kB\nMemAvailable:   60000000 kB\n"
CGROUPS = {
    "version 2, in a container": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/memory.max": "2147483648\n",
        }
        | {
            "sys/fs/cgroup/memory.current": "1000000000\n",
            "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 400000000\n",
        },
        (0.5, 2147483648, 2147483648 - 600000000),
    ),
    "version 2, narrower above": (
        {"proc/self/cgroup": "0::/user.slice/my box\n", "sys/fs/cgroup/user.slice/my box/cpu.max": "max 100000\n"}
        | {"sys/fs/cgroup/user.slice/cpu.max": "75000 100000\n", "sys/fs/cgroup/user.slice/memory.max": "max\n"}
        | {"sys/fs/cgroup/user.slice/memory.current": "5\n"},
        (0.75, 65536000 * 1024, 60000000 * 1024),
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "25000\n",
        }
        | {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000000\n",
        }
        | {
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000000\n",
            "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500000000\n",
        },
        (0.25, 4000000000, 3000000000),
    ),
    "version 1, without a limit": (
        {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
        | {"sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000000\n"},
        (None, 65536000 * 1024, 60000000 * 1024),
    ),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_limits_are_the_containers(fakes: Fakes, tmp_path: Path, case: str) -> None:
    files, (cores, memory, free) = CGROUPS[case]
    facts = ask(fakes, system(tmp_path / "sys", {**files, "proc/meminfo": MEMINFO}))
    assert (facts.memory_bytes, facts.memory_free_bytes) == (memory, free)
    assert facts.cores == (cores if cores is not None else len(os.sched_getaffinity(0)))


# --- GPUs -----------------------------------------------------------------------------------------


def test_two_rtx_4090(fakes: Fakes) -> None:
    fakes.cards(*(GPU["RTX 4090"].format(i=i) for i in (1, 2)))
    facts = ask(fakes)
    assert facts.driver == "535.129.03" and facts.cards is not None and len(facts.cards) == 2
    card = facts.cards[0]
    assert (card.index, card.name, card.bus, card.uuid) == (
        1,
        "NVIDIA GeForce RTX 4090",
        "00000000:01:00.0",
        "GPU-4090-1",
    )
    assert (card.total_bytes, card.used_bytes, card.utilisation, card.ecc_now, card.xids) == (
        24564 * 2**20,
        2**20,
        0,
        None,
        (),
    )
    assert (
        facts.topology[1].split() == ["GPU0", "X", "SYS", "0-15"]
        and len(facts.topology) == 3
        and "\x1b" not in str(facts.topology)
    )
    assert facts.peers == () and facts.peers_said == "no libcuda.so.1"


def test_who_holds_memory_ecc_and_xid(fakes: Fakes) -> None:
    apps = f"GPU-h100-5, {os.getpid()}, 40000\nGPU-h100-5, 4194304, [N/A]\n[Not Found], [N/A], [N/A]\n"
    fakes.cards(GPU["H100"].format(i=5), capability="9.0", ecc="2, 17", apps=apps)
    log = "[  9.1] NVRM: Xid (PCI:0000:65:00): 79, pid='<unknown>', GPU has fallen off the bus.\n"
    log += "[ 10.1] NVRM: Xid (PCI:0000:66:00): 48, another card\n"
    log += "[ 11.0] NVRM: Xid (PCI:0000:65:00): 13, pid=7\n[ 12] NVRM: Xid (PCI:0000:65:00): 13\n"
    fakes.command("dmesg", f"#!/bin/sh\ncat <<'END'\n{log}END\n")
    facts = ask(fakes)
    assert facts.cards is not None and facts.kernel_log
    assert (facts.cards[0].capability, facts.cards[0].ecc_now, facts.cards[0].ecc_ever) == ("9.0", 2, 17)
    assert facts.cards[0].xids == (79, 13)
    ours, unseen = facts.holders
    assert (ours.gpu, ours.pid, ours.used_bytes) == (5, os.getpid(), 40000 * 2**20)
    program = Path("/proc/self/cmdline").read_text().split("\0")[0]  # of this process, which may be xdist's
    assert ours.command.startswith(program)
    assert (unseen.gpu, unseen.pid, unseen.used_bytes, unseen.command) == (5, 4194304, None, "")


def test_a_driver_that_does_not_know_what_is_asked_and_a_lost_card(fakes: Fakes) -> None:
    fakes.command(
        "nvidia-smi",
        '#!/bin/sh\necho "Unable to determine the device handle for GPU 0000:65:00.0: GPU is lost."; exit 15\n',
    )
    facts = ask(fakes)
    assert (
        facts.cards is None
        and facts.smi_error == "Unable to determine the device handle for GPU 0000:65:00.0: GPU is lost."
    )


def test_tools_that_hang_take_nothing_with_them(fakes: Fakes, shell: list[str]) -> None:
    """Each in a child of its own: that, too, is ended."""
    mark = f"61.{os.getpid()}"
    for name in ("nvidia-smi", "docker", "curl", "dmesg", "df"):
        fakes.command(name, f"#!/bin/sh\nsleep {mark}\necho late\n")
    facts = ask(fakes, "root=$HOME/rlhf-box", "direct=http://127.0.0.1:1/x", shell=shell)
    # PROBE_S on a quiet machine; what is shown here is that it does not wait for the 61 s of those
    # that hang.
    assert facts.complete and facts.elapsed_s is not None and facts.elapsed_s < 5 * PROBE_S
    late = {"cards", "docker", "hub_direct", "disk0", "shm", "kernel_log"}
    if "busybox-static" in shell[0]:  # it takes its own df and dmesg before those of PATH
        late -= {"disk0", "shm", "kernel_log"}
    assert late <= set(facts.late)
    assert facts.cards is None and facts.tools is not None and facts.tools["tar"] and facts.pythons
    wait_for(lambda: sleepers(mark) == [])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, "the reader is gone"])
def test_a_broken_line_leaves_no_process(fakes: Fakes, how: signal.Signals | str) -> None:
    mark = f"62.{os.getpid()}"
    for name in ("nvidia-smi", "docker"):
        fakes.command(name, f"#!/bin/sh\nsleep {mark}\n")
    probe = subprocess.Popen(
        [*SHELLS[0], "-c", script("probe.sh").decode(), "sh"],
        stdout=subprocess.PIPE,
        env=fakes.environ,
        start_new_session=True,
    )
    assert probe.stdout is not None and probe.stdout.readline().startswith(b"clock\t")
    wait_for(lambda: sleepers(mark) != [])
    if isinstance(how, signal.Signals):
        probe.send_signal(how)
    probe.stdout.close()
    probe.wait(timeout=60)
    wait_for(lambda: sleepers(mark) == [])  # killed they are; on a busy machine it takes a moment until they are gone


def test_only_its_own_children_are_ever_ended(fakes: Fakes) -> None:
    """A wrong number in its list must not reach another process: process 1 is a parent of all."""
    text = script("probe.sh").decode()
    function = text[text.index("end_tree() {") : text.index("end_all() {")].replace("kill -KILL", "echo would end")
    calls = (
        function.replace("2>/dev/null\n}", "\n}")
        + "\nend_tree 1 $PPID 0 '' $$; sleep 30 & end_tree 1 $! '' $$; kill -KILL $!"
    )
    done = subprocess.run([*SHELLS[0], "-c", calls], capture_output=True, text=True, check=True, timeout=10)
    (line,) = done.stdout.splitlines()
    assert len(line.removeprefix("would end").split()) == 1


def sleepers(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(ready: object, seconds: float = 60.0) -> None:
    assert callable(ready)
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- copies between cards -------------------------------------------------------------------------

# What the driver's library does for gpu_copy_check.py; device memory is main memory.
LIBCUDA = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long ptr;
static int current; static int contexts[8] = {0, 1, 2, 3, 4, 5, 6, 7}; static int reach[8][8];
static int is(const char *what) { return strstr(getenv("FAKE_CUDA"), what) != NULL; }
int cuInit(unsigned f) { return is("no driver") ? 100 : 0; }
int cuDeviceGetCount(int *n) { *n = atoi(getenv("FAKE_CARDS")); return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &contexts[d]; return is("full") && d == 1 ? 2 : 0; }
int cuCtxSetCurrent(void *c) { current = *(int *)c; return 0; }
int cuMemAlloc_v2(ptr *p, size_t n) { *p = (ptr)malloc(n); memset((void *)*p, 0x55, n); return 0; }
int cuDeviceCanAccessPeer(int *can, int a, int b) { *can = !is("far"); return 0; }
int cuCtxEnablePeerAccess(void *c, unsigned f) {
    int b = *(int *)c; if (reach[current][b]) return 704; reach[current][b] = 1; return 0;
}
int cuMemsetD8_v2(ptr p, unsigned char v, size_t n) { memset((void *)p, v, n); return 0; }
int cuMemcpyHtoD_v2(ptr p, const void *s, size_t n) { memcpy((void *)p, s, n); return 0; }
int cuMemcpyDtoH_v2(void *t, ptr p, size_t n) { memcpy(t, (void *)p, n); return 0; }
int cuCtxSynchronize(void) { return 0; }
int cuMemcpyPeer(ptr t, void *tc, ptr s, void *sc, size_t n) {
    int a = *(int *)sc, b = *(int *)tc;
    if (is("zeros")) return 0;
    if (is("refused") && a == 1) return 217;
    memcpy((void *)t, (void *)s, n);
    if (is("one bit") && a == 0 && b == 1) ((char *)t)[n - 1] ^= 1;
    return 0;
}
"""


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs gcc or cc")
    folder = tmp_path_factory.mktemp("libcuda")
    (folder / "cuda.c").write_text(LIBCUDA)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"], check=True)
    return folder


@pytest.mark.parametrize(
    ("behaviour", "cards", "lines"),
    [
        ("good", 2, ["peer\t0|1|1|right", "peer\t1|0|1|right"]),
        ("zeros", 2, ["peer\t0|1|1|wrong", "peer\t1|0|1|wrong"]),  # as on RTX 4090 with old drivers
        ("far", 2, ["peer\t0|1|0|right", "peer\t1|0|0|right"]),
        ("far, zeros", 2, ["peer\t0|1|0|wrong", "peer\t1|0|0|wrong"]),
        (
            "one bit",
            3,
            [
                f"peer\t{a}|{b}|1|{'wrong' if (a, b) == (0, 1) else 'right'}"
                for a, b in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1))
            ],
        ),
        ("refused", 2, ["peer\t0|1|1|right", "peer\t1|0|1|failed cuMemcpyPeer 217"]),
        ("full", 2, ["peers\tfailed cuDevicePrimaryCtxRetain 2"]),
        ("no driver", 2, ["peers\tfailed cuInit 100"]),
        ("good", 1, ["peers\t1 cards"]),
    ],
)
def test_copies_are_compared(libcuda: Path, behaviour: str, cards: int, lines: list[str]) -> None:
    environ = {"LD_LIBRARY_PATH": str(libcuda), "FAKE_CUDA": behaviour, "FAKE_CARDS": str(cards)}
    done = subprocess.run(
        [sys.executable, "-"],
        input=script("gpu_copy_check.py").decode(),
        env=environ,
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert done.stdout.splitlines() == lines and done.stderr == ""


def test_the_probe_tries_them(fakes: Fakes, libcuda: Path) -> None:
    fakes.cards(*(GPU["RTX 4090"].format(i=i) for i in (0, 1)))
    facts = ask(fakes, LD_LIBRARY_PATH=str(libcuda), FAKE_CUDA="zeros", FAKE_CARDS="2")
    assert facts.peers == (Peer(0, 1, True, "wrong"), Peer(1, 0, True, "wrong")) and facts.cards is not None
    assert [card.capability for card in facts.cards] == ["8.9", "8.9"]


# --- Docker ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said", "runtime"),
    [
        (0, "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-4090-0)", "docker"),
        (
            125,
            'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
            "bare",
        ),
        (0, "", "bare"),  # a container without a card
        (127, "exec: nvidia-smi: not found", "docker"),  # the image's fault; the runtime is listed
    ],
)
def test_dockers_gpu_runtime_is_tried(fakes: Fakes, code: int, said: str, runtime: str) -> None:
    fakes.cards(GPU["RTX 4090"].format(i=0))
    fakes.command("docker", DOCKER)
    fakes.file("gpus", f"{said}\n" if said else "")
    fakes.file("code", str(code))
    facts = ask(fakes)
    docker = facts.docker
    assert (docker.client, docker.server, docker.compose, docker.buildx) == ("27.3.1", "27.3.1", "2.29.7", "0.17.1")
    assert docker.runtimes == ("io.containerd.runc.v2", "nvidia", "runc")
    assert (docker.gpu_code, docker.gpu_image, docker.gpu_said) == (code, "rlhf-box:cu118", said)
    assert runtime_of(facts).name == runtime
    run = (fakes.files / "run").read_text().split()
    assert (
        "--rm" in run
        and run[run.index("--gpus") + 1] == "all"
        and run[run.index("--pull") + 1] == "never"
        and run[-2:] == ["rlhf-box:cu118", "-L"]
    )


def test_what_docker_says_of_its_daemon_comes_before_what_it_says_of_the_format(fakes: Fakes) -> None:
    said = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"
    template = 'template: :1:2: executing "" at <.ServerVersion>: reflect: indirection through nil pointer'
    fakes.command("docker", f"#!/bin/sh\n[ \"$1\" = info ] || exit 1\necho '{template}'\necho '{said}'\nexit 1\n")
    assert ask(fakes).docker.error == said


def test_docker_without_its_daemon(fakes: Fakes) -> None:
    refusal = "permission denied while trying to connect to the Docker daemon socket"
    fakes.command(
        "docker",
        f"#!/bin/sh\ncase $1 in --version) echo 'Docker version 27.3.1, build x' ;; *) echo '{refusal}' >&2; exit 1 "
        f";; esac\n",
    )
    facts = ask(fakes)
    assert (facts.docker.client, facts.docker.server, facts.docker.error) == ("27.3.1", "", refusal)
    assert runtime_of(facts).lacking == "daemon"


# --- the way to the hub ---------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Return the hub's address and what was asked of it: a path, or a whole address by a proxy."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = b"{}" if self.path.endswith("config.json") else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_ways_to_the_hub_are_not_mixed(fakes: Fakes, hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    turbo = f"export http_proxy={address} https_proxy={address}\necho proxy is on\n"
    under = system(tmp_path / "sys", {"etc/network_turbo": turbo})
    args = probe_args(PROVIDERS, hub="http://hub.invalid", mirror=f"{address}/")
    routes = {route.name: route for route in ask(fakes, under, *args).routes}
    assert {name: route.works for name, route in routes.items()} == {"direct": False, "mirror": True, "proxy": True}
    assert routes["mirror"].status == 200 and (routes["mirror"].total_s or 9) < 3 and routes["direct"].status is None
    assert sorted(asked) == [
        "/facebook/opt-125m/resolve/main/config.json",
        "http://hub.invalid/facebook/opt-125m/resolve/main/config.json",
    ]


def test_a_proxy_of_the_environment_is_neither_the_direct_way_nor_the_mirrors(
    fakes: Fakes, hub: tuple[str, list[str]]
) -> None:
    address, _ = hub
    dead = "http://127.0.0.1:9"
    routes = ask(
        fakes,
        f"direct={address}/config.json",
        f"mirror={address}/none",
        http_proxy=dead,
        https_proxy=dead,
        HTTPS_PROXY=dead,
    ).routes
    assert {route.name: (route.works, route.status) for route in routes} == {
        "direct": (True, 200),
        "mirror": (False, 404),
        "proxy": (False, None),
    }


@pytest.mark.parametrize("missing", [("curl",), ("curl", "wget")], ids=["by wget", "by Python"])
def test_without_curl(hub: tuple[str, list[str]], tmp_path: Path, missing: tuple[str, ...]) -> None:
    """On a box with few tools: a PATH of our own, and none of the usual places behind it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    names = (
        "sh",
        "sed",
        "tr",
        "cat",
        "date",
        "uname",
        "id",
        "sort",
        "grep",
        "df",
        "stat",
        "ls",
        "cut",
        "tail",
        "nproc",
        "wc",
        "sleep",
        "wget",
    )
    for name in (*names, "python3"):
        found = sys.executable if name == "python3" else shutil.which(name)
        if name not in missing and found:
            (tools / name).symlink_to(found)
    text = script("probe.sh").decode().replace("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:", "")
    address, _ = hub
    shell = shutil.which(SHELLS[0][0])
    assert shell is not None
    command = [shell, "-c", text, "sh", f"direct={address}/config.json", f"mirror={address}/none"]
    done = subprocess.run(
        command,
        env={"PATH": str(tools), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=90,
        check=False,
    )
    facts = parse(done.stdout)
    assert facts.complete and facts.tools is not None and "curl" not in facts.tools
    assert {route.name: route.works for route in facts.routes} == {"direct": True, "mirror": False}
    assert HubRoute("mirror").works is False
