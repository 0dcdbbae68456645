"""Test docker/install.sh as on Ubuntu 22.04 and 24.04, which CI cannot pull.

apt-get, Python and pip are stand-ins that record their arguments.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBLE = """\
Types: deb
URIs: http://archive.UBUNTU/ubuntu/
Suites: noble noble-updates
Components: main restricted universe

Types: deb
URIs: http://security.UBUNTU/ubuntu/
Suites: noble-security
""".replace("UBUNTU", "ubuntu" + ".com")
JAMMY = """\
# See http://help.ubuntu.com/community/UpgradeNotes
deb http://archive.UBUNTU/ubuntu/ jammy main restricted
deb http://security.UBUNTU/ubuntu/ jammy-security universe
""".replace("UBUNTU", "ubuntu" + ".com")
APT = """#!/bin/sh
echo "$*" >>{folder}/asked
[ "$2" != update ] || \
    sed -n 's/^deb //p; s/^URIs: //p' \
        "$(sed -n 's/^Dir::Etc::SourceList "\\(.*\\)";/\\1/p' "$APT_CONFIG")" >{folder}/sources
[ "$2" != install ] || exit {code}
"""


class Build:
    """A folder as the build stage's, in which a line of the Dockerfile can be run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("build", "bin", "tmp", "etc"):
            (folder / name).mkdir()
        (folder / "etc/sources.list").write_text(JAMMY)
        text = (ROOT / "docker/install.sh").read_text(encoding="utf-8")
        text = re.sub(r"/(build|tmp|etc|opt|run|var)/(?:apt/|venv/|secrets/)?", rf"{folder}/\1/", text)
        (folder / "build/install.sh").write_text(text)
        (folder / "build/torch_wheel.sh").write_text((ROOT / "env/torch_wheel.sh").read_text(encoding="utf-8"))
        (folder / "build/env").mkdir()
        (folder / "build/env/install_locked.sh").write_text(
            (ROOT / "env/install_locked.sh").read_text(encoding="utf-8")
        )
        for flavour in ("cu118", "cu130"):
            (folder / f"build/{flavour}.env").write_text((ROOT / f"env/flavours/{flavour}.env").read_text())
        for mirror in ("default", "cn"):
            (folder / f"build/{mirror}.env").write_text((ROOT / f"env/mirrors/{mirror}.env").read_text())
        self.stand_in("apt-get", APT.format(folder=folder, code=0))

    def stand_in(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).parent.mkdir(exist_ok=True)
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def run(
        self, line: str, mirror: str = "default", flavour: str = "cu118", **arguments: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a line of the Dockerfile; arguments: of the build, as CUDA_ARCHS="8.6"."""
        path = f"{self.folder}/bin:{self.folder}/tools"
        (self.folder / "tools").mkdir(exist_ok=True)
        # Not this machine's Python or compiler.
        for tool in ("sed", "cat", "rm", "grep", "cp", "uname", "sh", "dirname", "timeout", "tail"):
            if not (self.folder / "tools" / tool).exists():
                (self.folder / "tools" / tool).symlink_to(
                    next(p for p in (Path("/usr/bin") / tool, Path("/bin") / tool) if p.exists())
                )
        command = ["/bin/sh", "-euc", f". {self.folder}/build/install.sh; {line}"]
        environment = {"PATH": path, "MIRROR": mirror, "FLAVOUR": flavour, **arguments}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


@pytest.mark.parametrize(
    ("flavour", "line", "archs", "packages"),
    [
        ("cu118", "python_for operators", "default", " python3.10 python3.10-venv python3.10-dev g++ libc6-dev"),
        ("cu118", "python_for operators", "", " python3.10 python3.10-venv"),
        ("cu118", "python_for packages", "default", " python3.10 python3.10-venv"),
        ("cu130", "python_for operators", "default", " python3.12 python3.12-venv"),
        ("cu130", "python_for packages", "default", " python3.12 python3.12-venv python3.12-dev gcc libc6-dev"),
    ],
)
def test_ubuntu_gets_python_and_what_the_build_needs(
    build: Build, flavour: str, line: str, archs: str, packages: str
) -> None:
    done = build.run(line, flavour=flavour, CUDA_ARCHS=archs)
    assert done.returncode == 0, done.stderr
    update, install = build.asked()
    assert update.startswith("-qq update ")
    assert install == f"-qq install --yes --no-install-recommends{packages}"
    assert (build.folder / "sources").read_text() == JAMMY.split("\n", 1)[1].replace("deb ", "")
    assert not (build.folder / "tmp/apt.conf").exists()


def test_the_list_of_a_newer_ubuntu(build: Build) -> None:
    (build.folder / "etc/sources.list.d").mkdir()
    (build.folder / "etc/sources.list.d/ubuntu.sources").write_text(NOBLE)
    assert build.run("apt_install tree", mirror="cn", flavour="cu130").returncode == 0
    assert (build.folder / "sources").read_text() == "http://mirrors.tuna.tsinghua.edu.cn/ubuntu\n" * 2
    assert not (build.folder / "tmp/ubuntu.sources").exists()


def test_the_mirror_of_ubuntu_takes_the_place_of_both_hosts(build: Build) -> None:
    assert build.run("apt_install tree", mirror="cn").returncode == 0
    mirror = "http://mirrors.tuna.tsinghua.edu.cn/ubuntu"
    sources = (build.folder / "sources").read_text()
    assert sources == f"{mirror} jammy main restricted\n{mirror} jammy-security universe\n"


def test_a_package_that_does_not_come_ends_the_step(build: Build) -> None:
    build.stand_in("apt-get", APT.format(folder=build.folder, code=100))
    done = build.run("python_for packages; echo went on")
    assert done.returncode == 100
    assert "went on" not in done.stdout


@pytest.mark.parametrize(
    ("flavour", "mirror", "lock", "asked"),
    [
        (
            "cu118",
            "default",
            "torch-cu118",
            "https://download.pytorch.org/whl/cu118/torch-2.0.1%2Bcu118-cp310-cp310-linux_x86_64.whl "
            "--hash=sha256:a7a49d",
        ),
        (
            "cu118",
            "cn",
            "torch-cu118",
            "https://mirror.sjtu.edu.cn/pytorch-wheels/cu118/torch-2.0.1%2Bcu118-cp310-cp310-linux_x86_64.whl "
            "--hash=sha256:a7",
        ),
        (
            "cu118",
            "default",
            "torch-cu118-cpu",
            "https://download.pytorch.org/whl/cpu/torch-2.0.1%2Bcpu-cp310-cp310-linux_x86_64.whl --hash=sha256:fec257",
        ),
        (
            "cu130",
            "default",
            "torch-cu130-cpu",
            "https://download.pytorch.org/whl/cpu/torch-2.13.0%2Bcpu-cp312-cp312-manylinux_2_28_x86_64.whl "
            "--hash=sha256:4ca4a9",
        ),
    ],
)
def test_pytorch_comes_from_its_own_files(build: Build, flavour: str, mirror: str, lock: str, asked: str) -> None:
    """The files' names, with + written as %2B, are the same on the mirror, and so is the hash."""
    python = {"cu118": "python3.10", "cu130": "python3.12"}[flavour]
    build.stand_in(python, "#!/bin/sh\n")
    (build.folder / "opt/bin").mkdir(parents=True)
    (build.folder / "opt/bin/python").symlink_to(build.folder / "bin" / python)
    (build.folder / "build/pip.txt").write_text("")
    done = build.run(f"install_torch {ROOT}/env/pins/{lock}.txt", mirror, flavour)
    assert done.returncode == 0, done.stderr
    assert (build.folder / "tmp/torch.txt").read_text().startswith(f"torch @ {asked}")


@pytest.mark.parametrize(
    ("torch", "archs", "found", "refused"),
    [
        ("torch-cu118", "8.6", "", True),
        ("torch-cu118", "8.6", "/usr/local/cuda-11.8/targets/x86_64-linux/lib/libcudart.so.11.0", False),
        ("torch-cu118", "", "", False),  # nothing is compiled
        ("torch-ci", "8.6", "", False),  # brings it as a package
        ("torch-cu118-cpu", "", "", False),
    ],
)
def test_a_base_without_cudas_runtime_is_refused_before_operators_are_compiled_for_it(
    build: Build, torch: str, archs: str, found: str, refused: bool
) -> None:
    build.stand_in("find", f"#!/bin/sh\necho '{found}'\n")
    done = build.run(f"check_cudart {torch}; echo went on", CUDA_ARCHS=archs)
    assert (done.returncode, done.stdout) == ((3, "") if refused else (0, "went on\n"))
    error = "error: BASE_IMAGE has no libcudart.so.11.0, which DeepSpeed's operators need: leave BASE_IMAGE out"
    assert done.stderr.startswith(error) == refused


@pytest.mark.parametrize(
    ("flavour", "line", "said"),
    [
        ("cu118", "check_nvcc", "error: BUILD_IMAGE has nvcc not at all, and 11.8 compiles DeepSpeed's operators"),
        ("cu118", "check_base", "error: BASE_IMAGE has no Python 3.10, and is not Ubuntu 22.04, which could install"),
        ("cu130", "check_base", "error: BASE_IMAGE has no Python 3.12, and is not Ubuntu 24.04, which could install"),
    ],
)
def test_what_is_wrong_is_said_before_minutes_are_spent(build: Build, flavour: str, line: str, said: str) -> None:
    (build.folder / "etc/os-release").write_text('VERSION_ID="20.04"\n')
    done = build.run(line, flavour=flavour)
    assert done.returncode == 3
    assert done.stderr.startswith(said)


def test_an_index_that_does_not_answer_is_named(build: Build) -> None:
    (build.folder / "opt/bin").mkdir(parents=True)
    build.stand_in("../opt/bin/python", "#!/bin/sh\necho 'ERROR: Connection refused' >&2\nexit 1\n")
    done = build.run("check_sources; echo went on", mirror="cn")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(
        "ERROR: Connection refused\nerror: no answer from https://pypi.tuna.tsinghua.edu.cn/simple: choose another"
    )


@pytest.mark.parametrize("answers", [True, False])
def test_a_host_of_wheels_that_answers_anything_is_one_that_answers(build: Build, answers: bool) -> None:
    """It may refuse HEAD; one that nobody listens at is named."""
    (build.folder / "opt/bin").mkdir(parents=True)
    build.stand_in("../opt/bin/python", "#!/bin/sh\n")
    build.stand_in("python3.10", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # 501 to every method
        wheel = f"http://127.0.0.1:{server.server_port}/torch.whl"
        if answers:
            threading.Thread(target=server.handle_request, daemon=True).start()
        else:
            server.server_close()
        (build.folder / "tmp/torch.txt").write_text(f"torch @ {wheel} --hash=sha256:0\n")
        done = build.run("check_sources; echo went on")
    assert done.stdout == ("went on\n" if answers else "")
    assert done.returncode == (0 if answers else 3), done.stderr
    assert answers or f"error: no answer from {wheel}: choose another" in done.stderr
