"""Test env/venv.sh without its downloads.

A stand-in for Python records its arguments, and can fail or hang at any stage. It is the only
Python on PATH. The one test at the end uses the real Python and the real pip, without access to any
index.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = (
    "awk",
    "cat",
    "cksum",
    "cp",
    "date",
    "df",
    "dirname",
    "flock",
    "mkdir",
    "mv",
    "rm",
    "sed",
    "sh",
    "sleep",
    "tail",
    "touch",
    "uname",
)
PYTHON = r"""#!/bin/sh
echo "$*" >>"$STUB_CALLS"
case "$*" in *"${STUB_HANG:-nothing hangs}"*)
    touch "$STUB_CALLS.hangs"
    tries=0
    # a minute at most
    while ! [ -e "$STUB_CALLS.go" ] && [ "$tries" -lt 1200 ]; do sleep 0.05; tries=$((tries + 1)); done ;;
esac
[ -z "${STUB_FAIL:-}" ] || case "$*" in *"$STUB_FAIL"*) echo "ERROR: no route to host"; exit 1 ;; esac
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *"import sys"*) echo VERSION ;;
esac
"""
VERSIONS = dict(
    re.findall(r"^(\w+)==(\S+)", (ROOT / "env/pins/cpu.in").read_text(encoding="utf-8"), flags=re.MULTILINE)
)
TORCH = VERSIONS["torch"] + ("+cpu" if sys.platform == "linux" else "")
PACKAGE_STAGES = ["-m venv", "torch==", "wheels.txt", "cpu.txt", "import torch"]
LINK_STAGES = ["--editable", "pip check"]
needs_flock = pytest.mark.skipif(
    shutil.which("flock") is None, reason="flock(1) is not here, and env/venv.sh goes without its lock"
)


class Checkout:
    def __init__(self, root: Path) -> None:
        self.path = root / "it's a checkout"
        self.calls_file = root / "calls"
        self.bin = root / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        shutil.copytree(ROOT / "env", self.path / "env", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.path)

    def add_command(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def add_python(self, name: str, version: str) -> None:
        self.add_command(name, PYTHON.replace("VERSION", version))

    def start(self, **environ: str) -> subprocess.Popen[str]:
        command = ["sh", str(self.path / "env/venv.sh")]
        environ = {"PATH": str(self.bin), "STUB_CALLS": str(self.calls_file)} | environ
        return subprocess.Popen(
            command, cwd="/", env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self, **environ: str) -> tuple[int, str]:
        process = self.start(**environ)
        _, output = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self, words: str) -> int:
        return (
            sum(words in line for line in self.calls_file.read_text().splitlines()) if self.calls_file.exists() else 0
        )

    def is_whole(self) -> bool:
        """As its caller would see it: nothing more to do, nothing said."""
        before = self.calls("-m ")
        return self.run() == (0, "") and self.calls("-m ") == before

    def hung(self) -> None:
        deadline = time.monotonic() + 30
        while not Path(f"{self.calls_file}.hangs").exists():
            assert time.monotonic() < deadline, "the stage was never reached"
            time.sleep(0.02)

    def let_go(self) -> None:
        Path(f"{self.calls_file}.go").touch()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    made.add_python("python3", "3.11")
    return made


def test_the_second_call_does_nothing(checkout: Checkout) -> None:
    status, output = checkout.run()
    assert status == 0
    assert [line.split("  ")[1] for line in output.splitlines()[1:]] == [
        "virtual environment",
        f"PyTorch {TORCH} (about 200 MB)",
        "all else that is locked (about 300 MB)",
        "DeepSpeed",
        "does PyTorch start?",
        "this checkout",
        "do the packages fit each other?",
    ]
    assert checkout.is_whole()


def test_deepspeed_is_left_for_last(checkout: Checkout) -> None:
    checkout.run()
    lock, wheels = ((checkout.path / name).read_text() for name in ("env/pins/cpu.txt", ".venv/wheels.txt"))
    assert {line for line in lock.splitlines() if "==" in line} - set(wheels.splitlines()) == {
        f"deepspeed=={VERSIONS['deepspeed']} \\"
    }


@pytest.mark.parametrize("changed", ["the lock", "torch", "this script", "the Python inside", "the Python asked for"])
def test_a_change_below_makes_a_new_one(checkout: Checkout, changed: str) -> None:
    checkout.run()
    (checkout.path / ".venv/left over").touch()
    environ = {}
    if changed == "torch":
        pins = checkout.path / "env/pins/cpu.in"
        pins.write_text(pins.read_text().replace("torch==", "torch==1"))
    elif changed == "the Python inside":  # the system's python3 was upgraded, and .venv/bin/python is a link to it
        (checkout.path / ".venv/bin/python").write_text(PYTHON.replace("VERSION", "3.12"))
    elif changed == "the Python asked for":
        checkout.add_python("other python", "3.13")
        environ["PYTHON"] = str(checkout.bin / "other python")
    else:
        with (checkout.path / {"the lock": "env/pins/cpu.txt", "this script": "env/venv.sh"}[changed]).open(
            "a"
        ) as file:
            file.write("# changed\n")
    assert checkout.run(**environ)[0] == 0
    assert checkout.calls("-m venv") == 2 and not (checkout.path / ".venv/left over").exists()
    assert checkout.is_whole()


@pytest.mark.parametrize("changed", ["pyproject.toml", "the place"])
def test_a_change_of_the_project_only_links_anew(checkout: Checkout, changed: str) -> None:
    checkout.run()
    if changed == "pyproject.toml":
        with (checkout.path / "pyproject.toml").open("a") as file:
            file.write("# changed\n")
    else:
        checkout.path = checkout.path.rename(checkout.path.with_name("elsewhere"))
    assert checkout.run()[0] == 0
    assert (checkout.calls("-m venv"), checkout.calls("--editable")) == (1, 2)
    assert checkout.is_whole()


@pytest.mark.parametrize("stage", PACKAGE_STAGES + LINK_STAGES)
def test_killed_at_any_stage_the_next_call_mends_it(checkout: Checkout, stage: str) -> None:
    killed = checkout.start(STUB_HANG=stage)
    checkout.hung()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert checkout.run()[0] == 0
    assert checkout.calls("-m venv") == (2 if stage in PACKAGE_STAGES else 1)
    assert checkout.is_whole()


@pytest.mark.parametrize("stage", PACKAGE_STAGES + LINK_STAGES)
def test_a_failed_stage_is_said_and_not_taken_for_done(checkout: Checkout, stage: str) -> None:
    status, output = checkout.run(STUB_FAIL=stage)
    assert status == 3
    assert "error: cannot set up .venv: " in output and "    ERROR: no route to host\n" in output
    assert "\nhint: " in output
    assert checkout.run()[0] == 0
    assert checkout.is_whole()


@needs_flock
def test_two_at_once_make_one(checkout: Checkout) -> None:
    first = checkout.start(STUB_HANG="wheels.txt")
    checkout.hung()
    second = checkout.start()
    assert second.stderr is not None
    assert second.stderr.readline() == "another set-up of this checkout is running; waiting for it\n"
    checkout.let_go()
    assert (first.wait(30), second.wait(30)) == (0, 0)
    assert checkout.calls("-m venv") == 1


@needs_flock
def test_an_orphan_of_a_killed_call_is_waited_for(checkout: Checkout) -> None:
    killed = checkout.start(STUB_HANG="wheels.txt")
    checkout.hung()
    killed.kill()  # the shell only; its pip continues to write into .venv
    killed.wait()
    second = checkout.start()
    assert second.stderr is not None
    assert "waiting" in second.stderr.readline()
    checkout.let_go()
    assert second.wait(30) == 0
    assert checkout.calls("-m venv") == 2


@pytest.mark.parametrize("version", ["2.7", "3.9", "4.0"])
def test_a_wrong_python_is_named(checkout: Checkout, version: str) -> None:
    checkout.add_python("python3", version)
    status, output = checkout.run()
    assert status == 3
    assert output.startswith(
        f"error: no Python 3.10 or newer\n  why: python3 is {version}\n\n"
        "hint: sudo apt-get install python3 python3-venv"
    )
    assert not (checkout.path / ".venv").exists()


def test_no_python_at_all(checkout: Checkout) -> None:
    (checkout.bin / "python3").unlink()
    status, output = checkout.run()
    assert status == 3
    assert output.startswith(
        "error: no Python 3.10 or newer\n"
        "  why: no command of python3 python3.13 python3.12 python3.11 python3.10 runs\n"
    )


def test_an_old_python3_does_not_hide_a_newer_one(checkout: Checkout) -> None:
    checkout.add_python("python3", "3.9")
    checkout.add_python("python3.12", "3.12")
    status, output = checkout.run()
    assert status == 0 and "bin/python3.12 (3.12)" in output


@pytest.mark.parametrize(
    ("name", "package"), [("python3", "python3-venv"), ("python3.12", "python3.12-venv"), ("python", "python3.12-venv")]
)
def test_a_python_without_venv_names_the_package(checkout: Checkout, name: str, package: str) -> None:
    checkout.add_python(name, "3.12")
    status, output = checkout.run(STUB_FAIL="ensurepip", PYTHON=name)
    assert status == 3
    assert output.endswith(f"hint: sudo apt-get install {package}\n")


def test_a_wrong_PYTHON_leaves_the_environment_alone(checkout: Checkout) -> None:
    checkout.run()
    status, output = checkout.run(PYTHON="/no/such/python")
    assert status == 3 and output.startswith("error: no Python 3.10 or newer at PYTHON=/no/such/python\n")
    assert checkout.is_whole()


def test_a_full_disk_is_said_before_the_download(checkout: Checkout) -> None:
    (checkout.bin / "df").unlink()
    checkout.add_command("df", "#!/bin/sh\necho Filesystem\necho /dev/sda1 9000000 8000000 1000000 90% /\n")
    status, output = checkout.run()
    assert status == 3
    assert output.startswith("error: the disk is too full to set up .venv\n  why: 1000 MB are free at ")
    assert checkout.calls("-m ") == 0


def test_without_flock_it_continues(checkout: Checkout) -> None:
    (checkout.bin / "flock").unlink(missing_ok=True)
    assert checkout.run()[0] == 0
    assert checkout.is_whole()


def test_without_a_network_the_real_pip_is_quoted(checkout: Checkout, tmp_path: Path) -> None:
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if not base.exists():
        pytest.skip(f"the Python that made this environment is not at {base}")
    environ = {"PYTHON": str(base), "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "HOME": str(tmp_path)}
    status, output = checkout.run(**environ)
    assert status == 3
    assert f"error: cannot set up .venv: PyTorch {TORCH} " in output
    assert f"    ERROR: No matching distribution found for torch=={TORCH}\n" in output
    assert "download.pytorch.org" in output.splitlines()[-1]
    assert not (checkout.path / ".venv/packages.stamp").exists()
