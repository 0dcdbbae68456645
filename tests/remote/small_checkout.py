"""A checkout that is small and whole: our own scripts and a few files of each package.

Stand-ins replace what is large: three wheels of some lines, and locks that name them.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = (
    *(
        "remote/on_box/land.sh",
        "remote/on_box/environment.sh",
        "remote/on_box/lib.sh",
        "env/torch_wheel.sh",
        "env/install_locked.sh",
        "env/take_torch.py",
        "env/pins/uv.txt",
        "env/cuda.sh",
        "env/caches.sh",
    ),
    *("docker/check_image.py", "docker/Dockerfile", "docker/install.sh", "docker/entrypoint", "docker/compose.cpu.yml"),
    *("env/mirrors/default.env", "env/flavours/cu118.env", "env/flavours/cu130.env", ".gitignore"),
)
# What makes a name hard: a blank, quotes, what a shell would run, a newline, a dash or what rsync
# takes for a comment in front, and bytes.
HOSTILE = (
    "a b",
    "it's",
    'say "x"',
    "$(touch owned)",
    "`id`",
    "new\nline",
    "-rf",
    "#comment",
    ";comment",
    "ünï",
    "back\\slash",
    "*",
    "[a]",
    "a  b ",
    "~",
    "c:d",
)
# As the real one, and what it imports, when it is imported.
MAKES_FOLDERS = """
import os
hub, triton = ("HF_HOME", "~/.cache/huggingface"), ("TRITON_CACHE_DIR", "~/.triton/autotune")
for folder in hub, triton, ("XDG_CACHE_HOME", "~/.cache/x"):
    os.makedirs(os.environ.get(folder[0]) or os.path.expanduser(folder[1]), exist_ok=True)
"""
# {name: (version, files)}
WHEELS = {
    "torch": (
        "2.0.1",
        {
            "torch/__init__.py": "from torch import cuda, version\n",
            "torch/cuda.py": "def is_available():\n    return False\n",
            "torch/version.py": "cuda = None\n",
        },
    ),
    "deepspeed": (
        "0.15.4",
        {"deepspeed/__init__.py": MAKES_FOLDERS, "deepspeed/git_version_info.py": "installed_ops = {}\n"},
    ),
    "alpha": ("1.0", {"alpha.py": "VALUE = 1\n"}),
    # Two that share a file, as PyTorch's packages of libraries do.
    "cudnn": ("8.5", {"nvidia/__init__.py": "", "nvidia/cudnn.py": "VALUE = 8\n"}),
    "nvrtc": ("11.7", {"nvidia/__init__.py": "", "nvidia/nvrtc.py": "VALUE = 11\n"}),
}


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def git(folder: Path, *words: str) -> None:
    alone = [
        "-c",
        "core.excludesFile=/dev/null",
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "-c",
        "init.defaultBranch=main",
    ]
    subprocess.run(["git", "-C", str(folder), *alone, *words], check=True, capture_output=True)


def make_checkout(folder: Path, index: Path, *, with_git: bool = True) -> Path:
    """index: of the wheels, as `make_index` made it."""
    for name in OURS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"  # this Python makes the environment
    flavour = folder / "env/flavours/cu118.env"
    flavour.write_text(flavour.read_text(encoding="utf-8").replace("PYTHON=3.10", f"PYTHON={own}"), encoding="utf-8")
    write(
        folder / "env/mirrors/here.env",
        f"HF_ENDPOINT=http://127.0.0.1:9\nPIP_INDEX_URL={index.as_uri()}\nPYTORCH_WHEELS={index.as_uri()}\n",
    )
    write(folder / "jobs/spec.py", "x = 1\n")
    write(folder / "rlhf_train/__init__.py", "")
    write(folder / "rlhf_train/main.py", "print('hello')\n")
    write(folder / "tool.sh", "#!/bin/sh\n", 0o755)
    locks = {"torch-cu118-cpu": ["torch"], "torch-cu118": ["torch"], "cu118": ["alpha", "deepspeed"], "pip": []}
    locks |= {name.replace("cu118", "cu130"): packages for name, packages in locks.items()}
    for name, packages in locks.items():
        lines = [
            f"{package}=={WHEELS[package][0]} \\\n    --hash=sha256:{digest(index, package)}\n    # via here\n"
            for package in packages
        ]
        write(folder / f"env/pins/{name}.txt", "# a lock\n" + "".join(lines))
    if with_git:
        git(folder, "init", "-q")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "all")
    return folder


def wheel_of(index: Path, package: str) -> Path:
    return index / package / f"{package}-{WHEELS[package][0]}-py3-none-any.whl"


def digest(index: Path, package: str) -> str:
    return hashlib.sha256(wheel_of(index, package).read_bytes()).hexdigest()


def record_digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def make_index(folder: Path) -> Path:
    """A package index on the disk."""
    for package, (version, files) in WHEELS.items():
        wheel = wheel_of(folder, package)
        wheel.parent.mkdir(parents=True)
        info = f"{package}-{version}.dist-info"
        texts = {
            **files,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in texts.items():
                archive.writestr(name, text)
            record = [f"{name},sha256={record_digest(text)},{len(text.encode())}\n" for name, text in texts.items()]
            archive.writestr(f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]))
        write(wheel.parent / "index.html", f'<a href="{wheel.name}">{wheel.name}</a>\n')
    return folder
