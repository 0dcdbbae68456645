"""The image checks itself when it is built: locked versions, PyTorch's CUDA, DeepSpeed's operators.

No GPU is needed.

    python check_image.py image.txt torch-cu118.txt "7.0 7.5 8.0 8.6 8.9 9.0"

The last argument is the compute capabilities that the operators were compiled for; it is empty if
there are no compiled operators. Every mistake is a line on stderr, and the exit status is 1. What
depends on the machine that runs the image is checked at start, by rlhf_train.
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


def cuda(torch_version: str) -> Iterator[str]:
    """Check the CUDA version that PyTorch was built for against its locked version.

    2.0.1+cu118 means CUDA 11.8, 2.0.1+cpu no CUDA; the package index's 2.0.1 does not say.
    """
    import torch

    tag = torch_version.partition("+")[2]
    wanted = f"{tag[2:-1]}.{tag[-1]}" if tag.startswith("cu") else None
    if tag and torch.version.cuda != wanted:
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
    image, torch_lock, capabilities = arguments
    expected = locked(Path(image).read_text(encoding="utf-8")) | locked(Path(torch_lock).read_text(encoding="utf-8"))
    mistakes = [f"Python is {sys.version.split()[0]}, not 3.10"] if sys.version_info[:2] != (3, 10) else []
    mistakes += versions(expected)
    mistakes += cuda(expected["torch"])
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
