"""Fixtures that several files share. torch is imported inside them: the tests of jobs/ and env/ run
without it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Fixtures: one engine and one image for tests/docker and tests/integration.
from tests.docker.images import (  # noqa: F401
    LEFT_TO_IMAGES,
    NOT_IN_IMAGES,
    PLACES_IN_IMAGES,
    box,
    built,
    docker,
    modern,
)
from tests.openssh import sshd_program  # noqa: F401 (for tests/remote and tests/integration/remote)

# Read when torch, Triton and DeepSpeed are imported.
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels are tested on the CPU
os.environ["DS_ACCELERATOR"] = "cpu"  # on a machine with a GPU it would take that
# Threads that wait for each other on busy cores: 64 tokens for 64 prompts took 13 s with two, 0.7 s
# with one.
os.environ["OMP_NUM_THREADS"] = "1"

if TYPE_CHECKING:
    from rlhf_train.ranks.collectives import World


# `make test-fast`: what runs without torch, and starts no server, shell job or environment.
FAST_PLACES = ("jobs/", "env/", "remote/", "test_house.py")
SLOW_FIXTURES = {
    "sshd_program",
    "far",
    "made",
    "on_box",
    "index",
    "checkout",
    "lock",
    "box",
    "fakes",
    "mirror",
    "python_with_old_datasets",
    "shown",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="only tests that need no torch and take no time: under a minute in all"
    )


# Two at a time (`-n 2`): the tests of a group run in order, in one process. A file is a group, but
# for places whose files share something dear: Docker's engine and image, with the box that is
# reached through sshd; the runs that faults are compared with. What takes long begins first.
SHARED_PLACES = {"docker/": "containers", "integration/remote/": "containers", "faults/": "faults"}
LONG_PLACES = ("docker/", "integration/remote/", "faults/", "integration/", "test_types.py", "remote/", "rlhf_train/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.split("::")[0].removeprefix("tests/"))

    return ByGroup(config, log)


# What is marked `pinned` runs in both images, by these files. That of cu130 has the versions of
# this stack (tests/env/test_pins.py), so a whole run of CI leaves it to them.
RUN_IN_BOTH_IMAGES = {"docker/test_modern.py", "docker/test_pinned.py"}


def left_to_the_images(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests that both images run, if the session has the files that do so."""
    if not {_place(item) for item in items} >= RUN_IN_BOTH_IMAGES:
        return []
    return [
        item
        for item in items
        if item.get_closest_marker("pinned")
        and _place(item).split("/")[0] in PLACES_IN_IMAGES
        and not any(name in item.nodeid for name in NOT_IN_IMAGES)
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("RLHF_CI") == "1" and (elsewhere := left_to_the_images(items)):
        config.hook.pytest_deselected(items=elsewhere)
        left = set(elsewhere)
        config.stash[LEFT_TO_IMAGES] = len(left)
        items[:] = [item for item in items if item not in left]
    if hasattr(config, "workerinput"):  # one of pytest-xdist's processes
        items.sort(key=lambda item: _begins_as(_place(item)))
    if config.getoption("--fast"):
        slow = [item for item in items if not _is_fast(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is imported by now out of garbage collection.

    It stays for good, and looking through it again and again took a quarter of a process's time:
    226 tests of models and generation took 11.3 CPU seconds, and 8.2 so.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def _place(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).as_posix()


def _group(place: str) -> str:
    return next((group for folder, group in SHARED_PLACES.items() if place.startswith(folder)), place)


def _begins_as(place: str) -> int:
    return next((at for at, folder in enumerate(LONG_PLACES) if place.startswith(folder)), len(LONG_PLACES))


def _is_fast(item: pytest.Item) -> bool:
    return _place(item).startswith(FAST_PLACES) and SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


@pytest.fixture(autouse=True)
def _no_torch_in_fast_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.config.getoption("--fast"):
        assert "torch" not in sys.modules, "a test of --fast has imported torch"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI everything is there: what a test skips for is missing by mistake."""
    report = yield
    if report.skipped and os.environ.get("RLHF_CI") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {call.excinfo.value if call.excinfo else report.longrepr}"
    return report


@pytest.fixture(scope="session")
def _only_rank() -> Iterator[World]:
    import torch.distributed as dist

    from tests import ranks

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ranks.environment(0, 1).items():
            patch.setenv(name, value)
        world = ranks.join(0, 1, dist.HashStore())
    yield world
    dist.destroy_process_group()


@pytest.fixture
def world(_only_rank: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """This process as the only rank of a run, ready for DeepSpeed engines."""
    from tests import ranks

    for name, value in ranks.environment(0, 1).items():
        monkeypatch.setenv(name, value)  # DeepSpeed reads some again for each engine
    return _only_rank
