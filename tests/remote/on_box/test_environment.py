"""remote/on_box/environment.sh with a real Python, venv and pip, and small local wheels."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remote.results.purge import parse
from tests.disks import unmount
from tests.remote.results.test_run_contents import ask
from tests.remote.small_checkout import make_checkout, make_index, wheel_of, write

KEY = "0123456789abcdef"


class OnBox:
    """ROOT with a deployed checkout, in which the script is called."""

    def __init__(self, folder: Path, index: Path) -> None:
        self.root, self.index, self.home = folder / "the root", index, folder / "home"
        self.home.mkdir()
        self.code = make_checkout(self.root / "code/abc", index, with_git=False)
        self.environment, self.log = self.root / "env" / KEY, self.root / f"env/{KEY}.log"
        write(self.root / "lock/owner", "who me\ntoken t\n")

    def start(self, *more: str, pipe_ignored: bool = False, **settings: Any) -> subprocess.Popen[str]:
        """pipe_ignored: SIGPIPE is, as under many a daemon; then a shell cannot trap it."""
        words = {
            "root": str(self.root),
            "token": "t",
            "key": KEY,
            "runtime": "bare",
            "flavour": "cu118",
            "torch": "torch-cu118-cpu",
            "mirror": "here",
            "device": "cpu",
        }
        words |= {"python": sys.executable, **settings}
        argv = [
            "sh",
            str(self.code / "remote/on_box/environment.sh"),
            *(f"{key}={value}" for key, value in words.items() if value),
            *more,
        ]
        clean = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(self.home)}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            argv,
            env=clean,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
            restore_signals=not pipe_ignored,
        )

    def run(self, *more: str, **settings: Any) -> tuple[int, list[str]]:
        process = self.start(*more, **settings)
        out, err = process.communicate(timeout=120)
        assert err == ""
        return process.returncode, [line for line in out.splitlines() if line != "beat" and not line.startswith("now")]

    @property
    def is_whole(self) -> bool:
        return (self.environment / "complete").exists()

    def quick_python(self, template: Path) -> str:
        return self.stand_in("python3.10", f'mkdir -p "$3" && cp -a \'{template}/.\' "$3"')

    def stand_in(self, name: str, text: str) -> str:
        return str(write(self.root / "tools" / name, f"#!/bin/sh\n{text}", 0o755))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("an index") / "simple")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip, which takes seconds to be made: most tests copy it."""
    made = tmp_path_factory.mktemp("template") / "venv"
    subprocess.run([sys.executable, "-m", "venv", made], check=True)
    return made


@pytest.fixture
def on_box(tmp_path: Path, index: Path) -> OnBox:
    return OnBox(tmp_path, index)


def wait_for(what: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def test_the_locks_become_an_environment_that_checked_itself(on_box: OnBox) -> None:
    write(on_box.environment / "lib/left by a killed call", "")
    code, said = on_box.run()
    assert code == 0, on_box.log.read_text()
    assert said[-2:] == ["note 3 packages as locked; operators for no card", "made"]
    assert [line.split(" ", 1)[1] for line in said if line.startswith("begin")] == [
        *("a virtual environment", "pip", "PyTorch (torch-cu118-cpu)", "all else that is locked", "DeepSpeed"),
        "self-check",
    ]  # fmt: skip
    assert on_box.is_whole and not (on_box.environment / "lib/left by a killed call").exists()
    imports = subprocess.run(
        [on_box.environment / "bin/python", "-c", "import alpha, deepspeed, torch; print(alpha.VALUE)"],
        capture_output=True,
        check=True,
    )
    assert imports.stdout == b"1\n"
    assert list((on_box.root / "cache/tmp").iterdir()) == []
    assert (on_box.root / "cache/triton").exists() and list(on_box.home.iterdir()) == []
    write(on_box.root / ".rlhf-box", "")
    shutil.rmtree(on_box.root / "lock")
    no_docker = on_box.stand_in("bin/docker", "exit 1")
    said = ask(
        "purge", str(on_box.root), env={"HOME": str(on_box.home), "PATH": f"{Path(no_docker).parent}:/usr/bin:/bin"}
    ).decode()
    assert parse(said, "box", "").is_clean and [path.name for path in on_box.home.parent.iterdir()] == ["home"]


@pytest.mark.parametrize("host", ["here", "host-2"])
def test_the_environment_of_a_live_job_is_not_removed(on_box: OnBox, host: str) -> None:
    slot, job, used = on_box.root / "slot", on_box.root / "runs/run-1/job", on_box.environment / "lib/used"
    start = Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = str(Path("/proc/self/ns/pid").readlink()).strip("pid:[]")
    of_slot = {"run": "run-1", "request": "req-1", "environment": KEY, "pid": str(os.getpid()), "start": start}
    of_slot["boot"] = f"{boot} {namespace} me" if host == "here" else f"2222-other 4026531836 {host}"
    for name, text in of_slot.items():
        write(slot / name, f"{text}\n")
    write(job / "request", "req-1\n")
    write(job / "heartbeat", f"{int(time.time())}\n")
    write(used, "")
    place = "here" if host == "here" else f"on host-2, which shares {on_box.root}"
    code, said = on_box.run(python="/no/such/python")
    assert (code, said[0]) == (
        3,
        f"refused the environment {KEY} is in use: run `run-1` is being trained in it, {place}",
    )
    assert said[-1].startswith("hint wait for its end, or ") and used.exists()
    if host == "here":
        write(slot / "start", "1\n")  # its number is another process by now
    else:
        write(job / "exit", "0\n")
    assert on_box.run(python="/no/such/python")[1][0] == "begin a virtual environment" and not used.exists()


def test_another_wheel_than_the_locked_is_refused(on_box: OnBox, template: Path) -> None:
    lock = on_box.code / "env/pins/cu118.txt"
    lock.write_text(re.sub("sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}", lock.read_text(), count=1))
    code, said = on_box.run(python=on_box.quick_python(template))
    assert (code, on_box.is_whole) == (3, False)
    assert "refused cannot make the environment: all else that is locked" in said
    assert said[-1].startswith("hint ") and any(line.startswith("why ") for line in said)


def test_a_package_that_is_not_there_is_named_with_the_last_lines(on_box: OnBox, template: Path) -> None:
    write(on_box.code / "env/pins/torch-cu118-cpu.txt", f"torch==1.9.9 --hash=sha256:{'0' * 64}\n")
    code, said = on_box.run(python=on_box.quick_python(template))
    assert code == 3 and "refused cannot make the environment: PyTorch (torch-cu118-cpu)" in said
    assert any("torch==1.9.9" in line for line in said if line.startswith("why"))
    assert said[-1].startswith("hint see that the box reaches its package index")


def test_what_fails_its_self_check_is_not_whole(on_box: OnBox, template: Path) -> None:
    flavour = on_box.code / "env/flavours/cu118.env"
    flavour.write_text(flavour.read_text().replace(f"PYTHON={sys.version_info[0]}.{sys.version_info[1]}", "PYTHON=3.1"))
    code, said = on_box.run(python=on_box.quick_python(template))
    assert (code, on_box.is_whole) == (3, False)
    assert "refused cannot make the environment: self-check" in said
    assert any(line.startswith("why error: Python is 3.") for line in said)


def slow_python(on_box: OnBox) -> str:
    """One whose venv takes a minute, and starts something itself."""
    return on_box.stand_in("python3.10", f"echo $$ >'{on_box.root}/started'\nsleep 61 & sleep 62")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def group_of(pid: int) -> list[int]:
    """Processes that live in the group of a pid."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()]
    return [int(row[0]) for row in rows if int(row[1]) == pid and row[2][0] not in "ZX"]


def test_it_keeps_the_lock_alive_and_says_so(on_box: OnBox) -> None:
    process = on_box.start(python=slow_python(on_box))
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()))
    reader.start()

    def wait_for_beats(count: int) -> None:  # a beat is said first, and renews the lock then
        seen = said.count("beat\n")
        wait_for(lambda: said.count("beat\n") >= seen + count)

    try:
        wait_for((on_box.root / "lock/renewed").exists)
        wait_for(lambda: "beat\n" in said)
        assert int((on_box.root / "lock/renewed").read_text()) > time.time() + 60
        assert (on_box.root / "lock/worker").read_text().split()[0] == str(process.pid)
        write(on_box.root / "lock/owner", "who another\ntoken other\n")
        wait_for_beats(1)  # what had begun to renew the lock before is done
        (on_box.root / "lock/renewed").unlink()
        wait_for_beats(2)
        assert not (on_box.root / "lock/renewed").exists()  # not a lock of somebody else
    finally:
        process.terminate()
        process.wait(timeout=10)
        reader.join()


@pytest.mark.parametrize("end", ["terminated", "nobody listens", "nobody listens, PIPE ignored", "killed"])
def test_nothing_of_it_lives_on(on_box: OnBox, end: str) -> None:
    """After a TERM, which a takeover sends; after the connection ended; and after a KILL.

    After a KILL the next call ends what was left.
    """
    process = on_box.start(python=slow_python(on_box), pipe_ignored="ignored" in end)
    wait_for(lambda: (on_box.root / "started").exists() and (on_box.root / "started").read_text())
    child = int((on_box.root / "started").read_text())
    wait_for(lambda: len(group_of(child)) == 3)
    assert process.stdout is not None and process.stderr is not None
    if end == "terminated":
        process.terminate()
    elif end.startswith("nobody listens"):
        process.stdout.close()
        process.stderr.close()
    else:
        wait_for((on_box.root / f"env/{KEY}.child").exists)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(5)
        assert group_of(child)
        code, _ = on_box.run(python="/no/such/python")
        assert code == 3
    process.wait(10)
    wait_for(lambda: not group_of(child), 5)
    assert not on_box.is_whole


@pytest.mark.parametrize(
    ("tool", "asked"),
    [
        ("conda", "create --yes --quiet --prefix {base} --override-channels --channel https://channel python=3.12"),
        ("micromamba", "create --yes --prefix {base} --channel https://channel python=3.12"),
        ("uv", "python install 3.12"),
    ],
)
def test_python_is_made_where_there_is_none(on_box: OnBox, tool: str, asked: str) -> None:
    mirror = on_box.code / "env/mirrors/here.env"
    mirror.write_text(mirror.read_text() + "CONDA_CHANNEL=https://channel\n")
    base = on_box.environment / "base"
    place = base / ("cpython-3.12/bin" if tool == "uv" else "bin")
    write(on_box.home / ".condarc", "channels: [a mirror]\n")
    writes = (
        'mkdir -p "$HOME/.conda" "${CONDA_PKGS_DIRS:-$HOME/pkgs}" "${UV_PYTHON_BIN_DIR:-$HOME/bin}"; cp '
        '"$CONDARC" "$HOME/.conda/seen"'
    )
    makes = f"mkdir -p '{place}'\nln -s '{on_box.root}/tools/python' '{place}/python3.12'"
    maker = on_box.stand_in(tool, f"echo \"$*\" >'{on_box.root}/asked'\n{writes}\n{makes}")
    on_box.stand_in("python", f"echo \"$0 $*\" >>'{on_box.root}/asked'\nexit 7")
    code, said = on_box.run(python="", maker=maker, flavour="cu130", torch="torch-cu130-cpu")
    assert (code, said[0]) == (3, f"begin Python 3.12, by {tool}")
    assert (on_box.root / "asked").read_text().splitlines() == [
        asked.format(base=base),
        f"{place}/python3.12 -m venv {on_box.environment}",
    ]
    assert [path.name for path in on_box.home.rglob("*")] == [".condarc"]
    assert (on_box.root / "cache/home/.conda/seen").read_text() == "channels: [a mirror]\n"


def test_docker_builds_with_what_boxes_yaml_says(on_box: OnBox) -> None:
    write(on_box.home / ".docker/config.json", "a login")
    writes = (
        'mkdir -p "${BUILDX_CONFIG:-$HOME/.docker/buildx}"; config=${DOCKER_CONFIG:-$HOME/.docker}; cp '
        '"$config/config.json" "$config/.token_seed"'
    )
    docker = on_box.stand_in(
        "docker",
        f"echo \"$*\" >>'{on_box.root}/asked'; [ \"$2\" = inspect ] || env >'{on_box.root}/environment'; echo '#7 "
        f"[build 3/9] RUN'; {writes}",
    )
    process = on_box.start("arg=CUDA_ARCHS=", "arg=BASE_IMAGE=a b", runtime="docker", python="")
    process.communicate(timeout=30)
    assert process.returncode != 0  # this Docker is not in its PATH
    text = (
        (on_box.code / "remote/on_box/environment.sh")
        .read_text()
        .replace("docker compose", f"'{docker}' compose")
        .replace("docker image", f"'{docker}' image")
    )
    (on_box.code / "remote/on_box/environment.sh").write_text(text)
    code, said = on_box.run("arg=CUDA_ARCHS=", "arg=BASE_IMAGE=a b", runtime="docker", python="", ca_bundle="/a/ca.pem")
    assert (code, said[-1]) == (0, "made")
    files = [f"--file {on_box.code}/{name}" for name in ("docker-compose.yml", "docker/compose.cpu.yml")]
    compose = f"compose --project-directory {on_box.code} --env-file /dev/null {' '.join(files)}"
    assert (on_box.root / "asked").read_text().splitlines() == [
        f"{compose} --progress plain build train",
        f"image inspect rlhf-box:{KEY}",
    ]
    found = dict(line.split("=", 1) for line in (on_box.root / "environment").read_text().splitlines() if "=" in line)
    wanted = {
        "RLHF_TAG": KEY,
        "MIRROR": "here",
        "TORCH": "torch-cu118-cpu",
        "CUDA_ARCHS": "",
        "BASE_IMAGE": "a b",
        "CA_BUNDLE": "/a/ca.pem",
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert [path.name for path in on_box.home.rglob("*")] == [".docker", "config.json"]
    assert (on_box.root / "cache/docker/.token_seed").read_text() == "a login"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a disk of its own")
def test_a_full_disk_is_named(on_box: OnBox, tmp_path: Path) -> None:
    (on_box.root / "env").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", on_box.root / "env"], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        code, said = on_box.run()
        assert code == 3
        assert "refused the disk is full, at: a virtual environment" in said
        assert not on_box.is_whole
    finally:
        unmount(on_box.root / "env")


def test_the_wheel_of_the_index_is_the_one_that_is_named(index: Path) -> None:
    """The stand-ins are what the tests take them for."""
    assert wheel_of(index, "torch").name == "torch-2.0.1-py3-none-any.whl"
