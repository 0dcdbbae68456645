"""Fixtures run `python ...` inside the images, which tests/docker/images.py makes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from subprocess import CompletedProcess

import pytest

from tests.docker import engine
from tests.docker.images import CHECKOUT, MIRROR, Box


@pytest.fixture(scope="session")
def in_image(built: Box, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CompletedProcess[str]]:
    return with_tests(built, tmp_path_factory)


@pytest.fixture(scope="session")
def in_modern_image(modern: Box, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CompletedProcess[str]]:
    return with_tests(modern, tmp_path_factory)


def with_tests(built: Box, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CompletedProcess[str]]:
    """Return what runs `python ...` inside the image with the tests and pytest.

    It runs as a user without an entry in /etc/passwd, and without a network.
    """
    image = f"rlhf-box:{built.variables['RLHF_TAG']}-with-tests"
    clean = tmp_path_factory.mktemp("image") / "rlhf-box"  # without the job files that other tests add
    engine.copy_checkout(CHECKOUT, clean, built.uid)
    (clean / "env/mirrors/tests.env").write_text(MIRROR)
    names = ("FLAVOUR", "MIRROR", "BASE_IMAGE", "BUILD_IMAGE", "TORCH", "CUDA_ARCHS")
    arguments = [f"--build-arg={name}={value}" for name, value in built.variables.items() if name in names]
    secret = [f"--secret=id=ca_bundle,src={built.variables['CA_BUNDLE']}"]
    built.docker(
        "build",
        *arguments,
        *secret,
        "--target=test",
        f"--tag={image}",
        "--file=docker/Dockerfile",
        ".",
        cwd=clean,
    )

    def run(
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 3600,
        options: tuple[str, ...] = (),
    ) -> CompletedProcess[str]:
        cache = tmp_path_factory.mktemp("cache")
        os.chown(cache, built.uid, built.uid)
        mounts = [f"--volume={clean}/tests:/app/tests:ro", f"--volume={clean}/pyproject.toml:/app/pyproject.toml:ro"]
        mounts.append(f"--volume={cache}:/cache")
        variables = [f"--env={name}={value}" for name, value in (environment or {}).items()]
        user = [f"--user={built.uid}:{built.uid}", "--init", "--shm-size=1g", "--network=none"]
        entry = ["--entrypoint", "python"]
        return built.docker(
            "run",
            "--rm",
            *user,
            *mounts,
            *variables,
            *entry,
            *options,
            image,
            *arguments,
            check=False,
            timeout_s=timeout_s,
        )

    return run
