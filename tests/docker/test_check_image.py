"""docker/check_image.py on a lock that is not what is installed.

The rest of it is shown by building the image.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docker/check_image.py"
INSTALLED = f"""
rich=={importlib.metadata.version("rich")} \\
    --hash=sha256:0
"""


FLAVOUR = """\
PYTHON=2.7
CUDA=11.8
CUDA_ARCHS="8.6"
"""


def check(tmp_path: Path, image: str, torch: str, lock: str, capabilities: str) -> tuple[int, list[str]]:
    for name, text in {"flavours/own.env": FLAVOUR, "pins/own.txt": image, f"pins/{lock}.txt": torch}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "own", lock, capabilities],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_every_mistake_is_a_line(tmp_path: Path) -> None:
    installed = importlib.metadata.version("torch")
    code, output = check(
        tmp_path,
        INSTALLED + "PyYAML==0.1 \\\nno-such-package==1.0\n",
        "torch==2.0.1+cu118 --hash=sha256:0\n",
        "torch-own",
        "default",
    )
    yaml = importlib.metadata.version("PyYAML")
    assert code == 1
    expected = [
        f"error: Python is {sys.version_info[0]}.{sys.version_info[1]}, not 2.7",
        f"error: PyYAML is {yaml}, not 0.1 as locked",
        "error: no-such-package is not installed, not 1.0 as locked",
        f"error: torch is {installed}, not 2.0.1+cu118 as locked",
        "error: torch was built for CUDA None, not 11.8",
        "error: DeepSpeed's fused_adam is not compiled",
        "error: DeepSpeed's cpu_adam is not compiled",
    ]
    assert output == expected


def test_nothing_is_said_of_what_is_as_locked(tmp_path: Path) -> None:
    _, output = check(tmp_path, INSTALLED, f"torch=={importlib.metadata.version('torch')}\n", "torch-own-cpu", "")
    assert [line for line in output if "Python is" not in line] == []
