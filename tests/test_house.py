"""The rules of the house: who may import whom, and what no file may hold.

Each rule is also shown a file that breaks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

OWN = {"env", "jobs", "remote", "rlhf_train", "fabfile", "tests"}
STANDARD = set(sys.stdlib_module_names) | {"tomllib"}  # 3.10 lacks it, and falls back to tomli
BASE = {
    "pydantic",
    "pydantic_core",
    "typing_extensions",
    "yaml",
    "rich",
    "tomli",
}  # what pyproject.toml's dependencies bring
SSH = {"fabric", "invoke", "paramiko"}

# fabfile -> remote -> jobs, env <- rlhf_train. The laptop half runs without torch, so it is told
# what it may import; the GPU half may import what it likes, so it is told what it may not.
MAY_IMPORT = {
    "env": STANDARD | BASE | {"env", "jobs"},
    "jobs": STANDARD | BASE | {"env", "jobs"},
    "remote": STANDARD | BASE | {"env", "jobs", "remote"},
    "fabfile.py": STANDARD | BASE | SSH | {"remote"},
}
MAY_NOT_IMPORT = {"rlhf_train": SSH | {"remote", "fabfile", "tests", "deepspeed"}}
MORE = {  # a folder ends with a slash
    "remote/tasks.py": SSH,
    "remote/verbs/": SSH,
    "rlhf_train/engine/deepspeed_engine.py": {"deepspeed"},
}

# Inside a package: its parts, a folder counting as one, and which of them each may import. A part
# may only name parts that stand above it here, so there is no circle.
REMOTE = {"scripts", "inventory", "output", "ssh", "survey"}
HOST = {"compat", "disk", "host"}
LOW = HOST | {"kernels", "ranks"}
WINGS = LOW | {"data", "models", "generation", "plan", "engine"}
INSIDE: dict[str, dict[str, set[str]]] = {
    "jobs": {
        "errors": set(),
        "events": set(),
        "run_dir": set(),
        "steps": {"events"},
        "yaml12": {"errors"},
        "state": {"errors", "events"},
        "formatting": {"events", "steps"},
        "pace": {"events"},
        "fitness": {"errors", "formatting"},
        "spec": {"errors", "run_dir", "steps", "yaml12"},
        "job_file_page": {"spec"},
        "families_table": set(),
        "flavours": {"errors", "fitness", "spec"},
        "model_shape": {"errors", "spec"},
        "estimate": {"model_shape", "spec", "steps"},
        "views": {"errors", "events", "run_dir", "steps", "yaml12", "state", "formatting", "pace"},
    },
    "remote": {
        "on_box": set(),  # runs on a box, without our other files
        "scripts": set(),
        "inventory": {"scripts"},
        "output": {"scripts"},
        "ssh": {"scripts", "inventory", "output"},
        "survey": {"scripts", "inventory", "output", "ssh"},
        "deploy": REMOTE,
        "runs": REMOTE | {"deploy"},
        "results": REMOTE | {"deploy"},
        "verbs": REMOTE | {"deploy", "runs", "results"},
        "tasks": REMOTE | {"deploy", "runs", "results", "verbs"},
    },
    "rlhf_train": {
        "compat": set(),
        "disk": set(),
        "host": set(),
        "demo": set(),  # nobody imports it, but a job file names its rule
        "kernels": HOST,
        "ranks": HOST,
        "data": LOW,
        "models": LOW | {"data"},
        "generation": LOW | {"data", "models"},
        "engine": LOW | {"data"},
        "plan": LOW | {"data", "models"},
        "steps": WINGS,
        "completion": HOST,
        "worker": WINGS | {"steps", "completion"},
        "tensorboard": set(),
        "trackers": set(),
        "after": WINGS | {"completion"},
        "launch": WINGS | {"steps", "completion", "worker", "tensorboard", "trackers"},
        "measure": WINGS | {"steps", "completion", "worker", "tensorboard", "trackers", "launch"},
        "local_runs": set(),
        "__main__": WINGS
        | {"steps", "completion", "worker", "tensorboard", "trackers", "after", "launch", "measure", "local_runs"},
    },
}
READS_ENVIRON = {"env/settings.py", "remote/verbs/base.py", "rlhf_train/__main__.py", "rlhf_train/launch.py"}
READS_ENVIRON |= {"rlhf_train/ranks/importer.py"}  # it sets a rank's number
# Tables by step number outside of jobs/steps.py, how many a file may have. Tests expect values of
# their own.
STEP_TABLES = {
    "benchmarks/faults.py": 1,  # how many updates the runs make that are killed here: not a fact about a step
    "benchmarks/scaling.py": 1,  # how much of a step is measured there
}

# Written in pieces, since this file is searched too.
REGISTRIES = re.compile(
    "|".join(
        (
            "py" r"pi\.org",
            "python" r"hosted\.org",
            r"deb\.deb" "ian",
            r"security\.deb" "ian",
            r"archive\.ubu" "ntu",
            "npm" r"js\.org",
        )
    )
)
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")


def tracked_files() -> list[Path]:
    """What git holds or would take, so that a new file is looked at before it is committed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip(f"needs a git checkout: {listing.stderr.decode().strip()}")
    return [
        ROOT / name for name in sorted(set(listing.stdout.decode().split("\0"))) if name and (ROOT / name).is_file()
    ]


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]


def top_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and first word of each absolute import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]


def wrong_imports(name: str, source: str) -> list[str]:
    part = name.split("/")[0]
    more = {
        module
        for place, modules in MORE.items()
        if name == place or (place.endswith("/") and name.startswith(place))
        for module in modules
    }
    wrong = []
    for line, module in top_imports(ast.parse(source)):
        allowed = module in more or (
            module in MAY_IMPORT[part] if part in MAY_IMPORT else module not in MAY_NOT_IMPORT.get(part, set())
        )
        if not allowed:
            wrong.append(f"{name}:{line} imports {module}")
    return wrong


def inner_imports(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and part of each import from the file's own package, also of those for types only."""
    package, *folders = name.split("/")[:-1]
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = [package, *folders][: len(folders) + 2 - node.level] if node.level else []
            modules = [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        for words in (module.split(".") for module in modules):
            if words[0] == package and len(words) > 1:
                yield node.lineno, words[1]


def wrong_inner_imports(name: str, source: str) -> list[str]:
    """Imports against the layers inside a package."""
    package, *inside = name.removesuffix(".py").split("/")
    if package not in INSIDE or inside == ["__init__"]:
        return []
    if inside[0] not in INSIDE[package]:
        return [f"{name} is of no part of {package} that is known here"]
    allowed = INSIDE[package][inside[0]] | {inside[0]}
    imports = inner_imports(name, ast.parse(source))
    return [f"{name}:{line} imports {package}.{part}" for line, part in imports if part not in allowed]


def environ_readers(name: str, source: str) -> list[str]:
    """Uses of os.environ and os.getenv outside the modules that may."""
    if name in READS_ENVIRON or name.split("/")[0] not in {"env", "jobs", "remote", "rlhf_train"}:
        return []
    nodes = (node for node in ast.walk(ast.parse(source)))
    found = [node.lineno for node in nodes if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}]
    return [f"{name}:{line} reads the environment" for line in found]


def step_tables(source: str) -> list[int]:
    """Find the lines of dict literals with the keys 1, 2 and 3."""
    literals = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict))
    keys = {node.lineno: {key.value for key in node.keys if isinstance(key, ast.Constant)} for node in literals}
    return sorted(line for line, values in keys.items() if {1, 2, 3} <= values)


def shared_class_names(sources: dict[str, str]) -> dict[str, list[str]]:
    """Find the public classes that two files define. sources: file name -> Python text."""
    places: dict[str, list[str]] = {}
    for name, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    return {name: files for name, files in places.items() if len(files) > 1}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_run_one_way() -> None:
    assert [
        wrong for path in python_files() for wrong in wrong_imports(relative(path), path.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("jobs/a.py", "import torch", ["jobs/a.py:1 imports torch"]),
        ("jobs/a.py", "def f():\n    from rlhf_train.losses import gae", ["jobs/a.py:2 imports rlhf_train"]),
        ("env/a.py", "import os, numpy", ["env/a.py:1 imports numpy"]),
        ("jobs/a.py", "import os, yaml, env.settings\nfrom jobs import spec\nfrom . import errors", []),
        ("remote/a.py", "import transformers", ["remote/a.py:1 imports transformers"]),
        ("remote/a.py", "from fabric import task", ["remote/a.py:1 imports fabric"]),
        (
            "remote/box.py",
            "from fabric import Connection\nimport rlhf_train",
            ["remote/box.py:1 imports fabric", "remote/box.py:2 imports rlhf_train"],
        ),
        ("fabfile.py", "from remote.tasks import *\nimport jobs", ["fabfile.py:2 imports jobs"]),
        ("rlhf_train/a.py", "import torch, remote", ["rlhf_train/a.py:1 imports remote"]),
        ("rlhf_train/a.py", "import deepspeed.comm", ["rlhf_train/a.py:1 imports deepspeed"]),
        (
            "rlhf_train/engine/deepspeed_engine.py",
            "import deepspeed\nimport fabric",
            ["rlhf_train/engine/deepspeed_engine.py:2 imports fabric"],
        ),
        ("tests/test_a.py", "import deepspeed, remote, rlhf_train", []),
        ("rlhf_train/steps/ppo.py", "from deepspeed import zero", ["rlhf_train/steps/ppo.py:1 imports deepspeed"]),
        (
            "remote/verbs/a.py",
            "from fabric import Connection\nimport rlhf_train",
            ["remote/verbs/a.py:2 imports rlhf_train"],
        ),
        ("remote/verbs/a.py", "from fabric import task\nimport torch", ["remote/verbs/a.py:2 imports torch"]),
    ],
)
def test_a_wrong_import_is_seen(name: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(name, source) == wrong


def test_imports_inside_a_package_run_one_way() -> None:
    assert [
        wrong
        for path in python_files()
        for wrong in wrong_inner_imports(relative(path), path.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize("package", INSIDE)
def test_the_layers_are_those_of_the_package_and_have_no_circle(package: str) -> None:
    paths = (
        path
        for path in python_files()
        if relative(path).startswith(f"{package}/") and path.parent.name + path.name != f"{package}__init__.py"
    )
    assert set(INSIDE[package]) == {relative(path).removesuffix(".py").split("/")[1] for path in paths}
    parts = list(INSIDE[package])
    assert [part for place, part in enumerate(parts) if INSIDE[package][part] - set(parts[:place])] == []


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        (
            "rlhf_train/kernels/a.py",
            "from rlhf_train import compat, plan",
            ["rlhf_train/kernels/a.py:1 imports rlhf_train.plan"],
        ),
        (
            "rlhf_train/kernels/a.py",
            "from rlhf_train.generation.families import opt",
            ["rlhf_train/kernels/a.py:1 imports rlhf_train.generation"],
        ),
        (
            "rlhf_train/models/a.py",
            "def f():\n    import rlhf_train.steps.ppo",
            ["rlhf_train/models/a.py:2 imports rlhf_train.steps"],
        ),
        (
            "rlhf_train/models/a.py",
            "from ..steps import ppo\nfrom .. import launch\nfrom . import networks",
            [
                "rlhf_train/models/a.py:1 imports rlhf_train.steps",
                "rlhf_train/models/a.py:2 imports rlhf_train.launch",
            ],
        ),
        (
            "rlhf_train/generation/families/a.py",
            "from ...steps import ppo\nfrom .opt import opt\nfrom ..decoder import Decoder",
            [
                "rlhf_train/generation/families/a.py:1 imports rlhf_train.steps",
            ],
        ),
        (
            "rlhf_train/data/a.py",
            "from rlhf_train.models import networks",
            ["rlhf_train/data/a.py:1 imports rlhf_train.models"],
        ),
        ("rlhf_train/disk.py", "from rlhf_train import compat", ["rlhf_train/disk.py:1 imports rlhf_train.compat"]),
        (
            "rlhf_train/steps/a.py",
            "from rlhf_train import worker",
            ["rlhf_train/steps/a.py:1 imports rlhf_train.worker"],
        ),
        (
            "rlhf_train/steps/a.py",
            "from rlhf_train.demo.rule import is_good",
            ["rlhf_train/steps/a.py:1 imports rlhf_train.demo"],
        ),
        (
            "rlhf_train/steps/a.py",
            "import torch, jobs.spec\nfrom rlhf_train.engine import checkpointer\nfrom rlhf_train.steps.b import c",
            [],
        ),
        (
            "rlhf_train/engine/checkpointer.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rlhf_train.steps import context",
            [
                "rlhf_train/engine/checkpointer.py:3 imports rlhf_train.steps",
            ],
        ),
        (
            "rlhf_train/engine/checkpointer.py",
            "from rlhf_train.steps import context",
            [
                "rlhf_train/engine/checkpointer.py:1 imports rlhf_train.steps",
            ],
        ),
        (
            "rlhf_train/engine/a.py",
            "if TYPE_CHECKING:\n    from rlhf_train.steps import context",
            [
                "rlhf_train/engine/a.py:2 imports rlhf_train.steps",
            ],
        ),
        ("rlhf_train/__main__.py", "from rlhf_train.launch import launch", []),
        ("rlhf_train/new/a.py", "import torch", ["rlhf_train/new/a.py is of no part of rlhf_train that is known here"]),
        ("jobs/fitness.py", "from jobs.views.plain import Plain", ["jobs/fitness.py:1 imports jobs.views"]),
        ("jobs/views/a.py", "from jobs import events, spec", ["jobs/views/a.py:1 imports jobs.spec"]),
        ("remote/ssh/a.py", "from remote.survey.facts import parse", ["remote/ssh/a.py:1 imports remote.survey"]),
        ("remote/runs/a.py", "from remote.results import manifest", ["remote/runs/a.py:1 imports remote.results"]),
        ("remote/verbs/a.py", "from remote.runs import watch\nfrom remote.results import purge", []),
        ("env/a.py", "from env import settings", []),
    ],
)
def test_a_wrong_import_inside_a_package_is_seen(name: str, source: str, wrong: list[str]) -> None:
    assert wrong_inner_imports(name, source) == wrong


def test_what_is_known_by_a_step_s_number_stands_in_one_file() -> None:
    names = {relative(path): path for path in python_files() if not relative(path).startswith("tests/")}
    found = {name: step_tables(path.read_text(encoding="utf-8")) for name, path in names.items()}
    assert {name: len(lines) for name, lines in found.items() if lines} == STEP_TABLES, found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("NAMES = {1: 'one', 2: 'two', 3: 'three'}", [1]),
        ("def f(step):\n    return {3: a, 2: b, 1: c, **more}[step]", [2]),
        ("A = {1: {\n    1: 'x', 2: 'y', 3: 'z'\n}}", [1]),
        ("A = {'1': 1, '2': 2, '3': 3}\nB = {1: 'x', 2: 'y'}\nC = {step.number: step for step in steps}", []),
    ],
)
def test_a_table_by_step_number_is_seen(source: str, lines: list[int]) -> None:
    assert step_tables(source) == lines


def test_no_two_public_classes_share_a_name() -> None:
    packages = [
        path for path in python_files() if relative(path).split("/")[0] in {"env", "jobs", "remote", "rlhf_train"}
    ]
    assert shared_class_names({relative(path): path.read_text(encoding="utf-8") for path in packages}) == {}


def test_a_shared_class_name_is_seen() -> None:
    sources = {
        "a.py": "class Job: ...\nclass _Own: ...",
        "b.py": "class Job(Base): ...\nclass _Own: ...",
        "c.py": "class Jobs:\n    class Job: ...",
    }
    assert shared_class_names(sources) == {"Job": ["a.py", "b.py"]}


def test_only_named_modules_read_the_environment() -> None:
    assert [
        found for path in python_files() for found in environ_readers(relative(path), path.read_text(encoding="utf-8"))
    ] == []
    assert environ_readers("jobs/a.py", "import os\nos.environ['A']") == ["jobs/a.py:2 reads the environment"]


def test_every_file_is_python_3_10() -> None:
    for path in python_files():
        ast.parse(path.read_text(encoding="utf-8"), filename=relative(path), feature_version=(3, 10))
    with pytest.raises(SyntaxError):
        ast.parse("try: pass\nexcept* ValueError: pass", feature_version=(3, 10))


@pytest.mark.parametrize(
    "forbidden", [REGISTRIES, UNFINISHED], ids=["the host of a package registry", "an unfinished thought"]
)
def test_no_file_holds(forbidden: re.Pattern[str]) -> None:
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data:  # a picture, in whose bytes any three letters may stand
            continue
        lines = data.decode("utf-8", errors="replace").splitlines()
        found += [
            f"{relative(path)}:{number} {line.strip()[:80]}"
            for number, line in enumerate(lines, 1)
            if forbidden.search(line)
        ]
    assert found == []


def test_what_is_forbidden_is_recognised() -> None:
    assert REGISTRIES.search("https://" + "files." + "python" + "hosted.org/packages") and UNFINISHED.search(
        "# TO" + "DO later"
    )
    assert not REGISTRIES.search("https://download.pytorch.org/whl/cpu")


def test_packages_are_named_in_pyproject() -> None:
    """A package that is left out there is missing from the editable install without a word."""
    folders = {relative(path.parent).replace("/", ".") for path in tracked_files() if path.name == "__init__.py"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


def test_package_inits_are_empty_and_tests_have_none() -> None:
    inits = [path for path in tracked_files() if path.name == "__init__.py"]
    assert [relative(path) for path in inits if path.stat().st_size or "tests" in path.parts[len(ROOT.parts) :]] == []


def test_versions_live_in_env_pins_only() -> None:
    project = PYPROJECT["project"]
    wishes = [
        wish.split(";")[0]
        for wish in (
            *project["dependencies"],
            *(name for extra in project["optional-dependencies"].values() for name in extra),
        )
    ]
    assert [wish for wish in wishes if not re.fullmatch(r"[A-Za-z0-9_.-]+", wish)] == []


def test_the_lock_holds_what_is_asked_for() -> None:
    """Else somebody changed pyproject.toml or cpu.in without `make lock`. torch has other files."""
    project = PYPROJECT["project"]
    wishes = {
        re.split(r"[^A-Za-z0-9_.-]", wish)[0]
        for wish in (*project["dependencies"], *project["optional-dependencies"]["train"])
    }
    pins = (ROOT / "env/pins/cpu.in").read_text(encoding="utf-8")
    wishes |= set(re.findall(r"^[A-Za-z][A-Za-z0-9_.-]*", pins, flags=re.MULTILINE))
    lock = (ROOT / "env/pins/cpu.txt").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([a-z0-9.-]+)==([^ ;\\]+)", lock, flags=re.MULTILINE))
    assert {wish.lower().replace("_", "-") for wish in wishes} - set(locked) == {"torch"}
    assert [
        pin
        for pin in re.findall(r"^([a-z0-9-]+)==([^ #]+)", pins, flags=re.MULTILINE)
        if pin[0] != "torch" and locked[pin[0]] != pin[1]
    ] == []


def test_each_pin_ends_with_its_reason() -> None:
    for file in sorted((ROOT / "env/pins").glob("*.in")):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert [line for line in lines if not re.fullmatch(r"\S+(; .*?)?  +#.*\.", line)] == []


def test_shell_scripts_are_clean() -> None:
    scripts = [path for path in tracked_files() if path.suffix == ".sh" or path.read_bytes()[:10] == b"#!/bin/sh\n"]
    assert {"env/venv.sh", ".ci/run"} <= {relative(path) for path in scripts}
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not in this Python's environment; the lock brings it")
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
