"""The image checks itself when it is built: locked versions, PyTorch's CUDA, DeepSpeed's operators.

No GPU is needed.

    python check_image.py env cu118 torch-cu118 default

The folder `env` has the flavour (flavours/cu118.env) and its locks (pins/cu118.txt and
pins/torch-cu118.txt). The last argument is the compute capabilities that the operators were
compiled for: `default` means the flavour's, and it is empty if there are no compiled operators.
Every mistake is a line on stderr, and the exit status is 1. What depends on the machine that runs
the image is checked at start, by rlhf_train.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

OPERATORS = ("fused_adam", "cpu_adam")


def locked(text: str) -> dict[str, str]:
    """Return the version of each package in a lock, by name."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", text, re.MULTILINE))


def versions(expected: dict[str, str]) -> Iterator[str]:
    installed = {name(d): d.version for d in importlib.metadata.distributions()}
    for package, version in expected.items():
        found = installed.get(re.sub(r"[-_.]+", "-", package).lower())
        if found != version:
            yield f"{package} is {found or 'not installed'}, not {version} as locked"


def name(distribution: importlib.metadata.Distribution) -> str:
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()


def settings(text: str) -> dict[str, str]:
    """Return the settings of a flavour by name, without their quotes."""
    return {key: value.strip('"') for key, value in re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)}


def cuda(torch_lock: str, flavours_cuda: str) -> Iterator[str]:
    """Check the CUDA version that PyTorch was built for against the name of its lock.

    torch-cu118 means the flavour's CUDA, torch-cu118-cpu none; torch-ci, the package index's build
    of PyTorch 2.0.1, is for another.
    """
    import torch

    if torch_lock == "torch-ci":
        return
    wanted = None if torch_lock.endswith("-cpu") else flavours_cuda
    if torch.version.cuda != wanted:
        yield f"torch was built for CUDA {torch.version.cuda}, not {wanted}"


def operators(capabilities: Sequence[str]) -> Iterator[str]:
    """Check that DeepSpeed finds its operators compiled, and that they load and fit the cards.

    Compiled operators spare the first start a compilation.
    """
    # What they were built for, though there is no card here.
    os.environ["DS_ACCELERATOR"] = "cuda" if capabilities else "cpu"
    from deepspeed.git_version_info import installed_ops

    for operator in OPERATORS:
        if installed_ops.get(operator, False) != bool(capabilities):
            yield f"DeepSpeed's {operator} is {'not ' if capabilities else ''}compiled"
        elif capabilities:
            try:
                module = importlib.import_module(f"deepspeed.ops.adam.{operator}_op")
            except ImportError as error:  # a library that is not in this image
                yield f"DeepSpeed's {operator} does not load: {error}"
                continue
            assert module.__file__ is not None
            if operator == "fused_adam":
                yield from _for_cards(Path(module.__file__), capabilities)


def _for_cards(library: Path, capabilities: Sequence[str]) -> Iterator[str]:
    """Check for the name of each architecture, which nvcc writes into the library's device code."""
    found = set(re.findall(rb"-arch sm_(\d+)|sm_(\d+)", library.read_bytes()))
    architectures = {with_option or plain for with_option, plain in found}
    for capability in capabilities:
        if capability.replace(".", "").encode() not in architectures:
            yield f"{library.name} has no code for compute capability {capability}"


def main(arguments: Sequence[str]) -> int:
    folder, flavour, torch_lock, capabilities = arguments
    env = Path(folder)
    wanted = settings((env / f"flavours/{flavour}.env").read_text(encoding="utf-8"))
    locks = [(env / f"pins/{lock}.txt").read_text(encoding="utf-8") for lock in (flavour, torch_lock)]
    expected = locked(locks[0]) | locked(locks[1])
    capabilities = wanted["CUDA_ARCHS"] if capabilities == "default" else capabilities
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    mistakes = [f"Python is {python}, not {wanted['PYTHON']}"] if python != wanted["PYTHON"] else []
    mistakes += versions(expected)
    mistakes += cuda(torch_lock, wanted["CUDA"])
    mistakes += operators(capabilities.split())
    mistakes += [line for line in _pip_check() if line]
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    if not mistakes:
        print(f"{len(expected)} packages as locked; operators for {capabilities or 'no card'}")
    return 1 if mistakes else 0


def _pip_check() -> list[str]:
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    return result.stdout.splitlines() if result.returncode else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
