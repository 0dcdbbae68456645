"""This program measures the verbs of `fab` over a slow connection, against DESIGN section 7.

`python benchmarks/remote.py` makes a box (a container with sshd and Python 3.10, as in the tests)
and a connection with a round trip of 100 ms to it. It deploys (some minutes, once), and prints
medians of whole commands, Python's own start included. `near` is the same box without the delay:
the difference, in round trips, is the cost of the connection. Then it gives the box a package index
of its own and a Python that has the locked PyTorch, as providers' images do, and measures what is
left of a first deploy. It needs root on Linux, and Docker, or Debian to install Docker on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import yaml
from rich import box as boxes
from rich.table import Table

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from jobs.views.console import console_on  # noqa: E402
from tests import tiny  # noqa: E402
from tests.docker import engine  # noqa: E402
from tests.docker.engine import Docker  # noqa: E402
from tests.integration.remote import rig  # noqa: E402
from tests.integration.remote.far_line import FarLine  # noqa: E402
from tests.integration.remote.rig import BareBox, Laptop, until  # noqa: E402

GRACE_S = 5.0  # that a job gets to end by itself
TABLE_WIDTH = 110
# All that a first deploy asks an index for, PyTorch excepted.
LOCAL_INDEX = """
set -eu
cd "$(ls -dt "$1"/code/*/ | head -n 1)"
python=$(echo "$1"/env/*/bin/python)
sed '/^deepspeed==/,/# via/d' env/pins/cu118.txt >/tmp/wheels.txt
sed -n '/^deepspeed==/,/# via/p' env/pins/cu118.txt >/tmp/deepspeed.txt
for lock in env/pins/pip.txt env/pins/uv.txt /tmp/wheels.txt; do
    "$python" -m pip download --quiet --no-deps --require-hashes --dest /tmp/packages --requirement "$lock"
done
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip download --quiet --no-deps --require-hashes --no-build-isolation \
    --no-binary deepspeed --dest /tmp/packages --requirement /tmp/deepspeed.txt
for file in /tmp/packages/*; do
    name=$(basename "$file" | sed 's/-[0-9].*//' | tr 'A-Z_.' 'a-z--')
    mkdir -p "/index/simple/$name"
    mv "$file" "/index/simple/$name/"
done
theirs=$(python3.10 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
said=$("$python" env/take_torch.py "env/pins/$2.txt" "$theirs")
case $said in not*) echo "$said" && exit 1 ;; esac
"""
LOCAL_MIRROR = "PIP_INDEX_URL=http://127.0.0.1:8000/simple\nPYTORCH_WHEELS=https://download.pytorch.org/whl\n"
RSYNC = "apt-get -qq update && apt-get -qq install -y --no-install-recommends rsync >/dev/null 2>&1"


@dataclass
class Row:
    what: str
    target_s: float
    far_s: list[float] = field(default_factory=list)
    near_s: list[float] = field(default_factory=list)

    @property
    def is_met(self) -> bool:
        return median(self.far_s) <= self.target_s

    def cells(self, round_trip_s: float) -> list[str]:
        far_s, near_s = median(self.far_s), median(self.near_s)
        spread = f"{min(self.far_s):.2f} to {max(self.far_s):.2f}"
        trips = f"{(far_s - near_s) / round_trip_s:.1f}" if round_trip_s else ""
        return [
            self.what,
            f"{far_s:.2f} s",
            spread,
            f"{near_s:.2f} s",
            trips,
            f"{self.target_s:g} s",
            "met" if self.is_met else "MISSED",
        ]


@dataclass
class Bench:
    laptop: Laptop
    box: BareBox
    job: Path
    count: int = 0

    @property
    def host(self) -> tuple[str, str]:
        return ("--host", self.box.name)

    # Each of these measures one verb once, from this laptop, and returns seconds.

    def deploy_unchanged(self, laptop: Laptop) -> float:
        return laptop.fab("deploy", *self.host).seconds

    def deploy_changed(self, laptop: Laptop) -> float:
        with (self.laptop.checkout / "README.md").open("a") as readme:
            readme.write(f"\nLine {time.time()}.\n")
        return laptop.fab("deploy", *self.host).seconds

    def attach(self, laptop: Laptop) -> float:
        """Measure from `fab logs --follow` to the first output."""
        began = time.monotonic()
        following = laptop.start("logs", *self.host, "--follow")
        until(lambda: following.out, 30, lambda: following.err)
        seconds = time.monotonic() - began
        following.kill()
        return seconds

    def attach_again(self, laptop: Laptop) -> float:
        """Measure from the break of a connection to the first byte after it.

        The box continues to write meanwhile. It uses `--json`, since events come often.
        """
        following = laptop.start("logs", *self.host, "--follow", "--json")
        until(lambda: following.out, 30, lambda: following.err)
        until(self.box.cut, 10)
        began = time.monotonic()
        until(lambda: "connection lost" in following.err, 30)
        size = len(following.out_bytes)
        until(lambda: len(following.out_bytes) > size, 60)
        seconds = time.monotonic() - began
        following.kill()
        return seconds

    def detach(self, laptop: Laptop) -> float:
        following = laptop.start("logs", *self.host, "--follow")
        until(lambda: following.out, 30)
        began = time.monotonic()
        following.interrupt()
        following.process.wait(10)
        return time.monotonic() - began

    def cancel(self, laptop: Laptop) -> float:
        run = self.start()
        done = laptop.fab("cancel", *self.host, "--run", run)
        assert "nothing of it is left" in done.out, done.all
        return done.seconds

    def cancel_deaf(self, laptop: Laptop) -> float:
        """Cancel a job whose processes do not react: they are stopped by a signal."""
        run = self.start()
        for process in self.box.processes("-m", "rlhf_train"):
            process.suspend()
        done = laptop.fab("cancel", *self.host, "--run", run)
        assert "nothing of it is left" in done.out, done.all
        return done.seconds

    def first_deploy(self, laptop: Laptop) -> float:
        """Deploy to a folder where nothing is, as on a new box."""
        self.count += 1
        name = f"new-{self.count}"
        laptop.add(name, {**self.box.entry, "data_folder": f"/{name}", "mirror": "local"})
        done = laptop.fab("deploy", "--host", name, timeout_s=1800)
        assert "which this box has" in done.all, done.all
        self.box.sh('rm -rf "$1"', f"/{name}")
        return done.seconds

    def has_its_own_index(self, trusted: Path) -> None:
        """Give the box a package index on its loopback, and its Python the locked PyTorch."""
        self.box.docker("cp", str(trusted), f"{self.box.container}:/tmp/trusted.pem")
        index = {name: os.environ[name] for name in ("PIP_INDEX_URL",) if name in os.environ}
        variables = [f"{name}={value}" for name, value in {"PIP_CERT": "/tmp/trusted.pem", **index}.items()]
        script = ("env", *variables, "sh", "-c", LOCAL_INDEX, "sh", self.box.root, self.box.entry["build"]["TORCH"])
        self.box.docker("exec", self.box.container, *script, timeout_s=1800)
        serve = ("python3.10", "-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory", "/index")
        self.box.docker("exec", "--detach", self.box.container, *serve)
        (self.laptop.checkout / "env/mirrors/local.env").write_text(LOCAL_MIRROR, encoding="utf-8")

    # --- a job to measure with ---

    def start(self) -> str:
        """Start a job that trains for hours, and return its run's name."""
        self.count += 1
        run = f"bench-{self.count}"
        self.laptop.fab("train", *self.host, "--job", str(self.job), "--step", "1", "--run", run, "--detach")

        def trains() -> bool:
            log = self.laptop.fab("logs", *self.host, "--run", run, "--json").out
            return '"kind": "metrics"' in log.replace('":"', '": "')

        until(trains, 180)
        return run

    @contextmanager
    def training(self) -> Iterator[None]:
        run = self.start()
        try:
            yield
        finally:
            self.laptop.fab("cancel", *self.host, "--run", run)


def measure(
    bench: Bench, line: FarLine, delay_s: float, times: int, trusted: Path, say: Callable[[str], None]
) -> list[Row]:
    far = bench.laptop.far(line)

    def row(what: str, target_s: float, once: Callable[[Laptop], float], repeat: int = times) -> Row:
        measured = Row(what, target_s)
        once(far)  # not counted: it fills the disk's caches
        for _ in range(repeat):
            line.delay(delay_s)
            measured.far_s.append(once(far))
            line.delay(0)
            measured.near_s.append(once(far))
        line.delay(delay_s)
        say(f"  {what}: {median(measured.far_s):.2f} s")
        return measured

    rows = [
        row("deploy, nothing changed", 1.5, bench.deploy_unchanged),
        row("deploy, one file changed (by tar)", 3, bench.deploy_changed),
    ]
    bench.box.sh(RSYNC)
    bench.laptop.fab("doctor", *bench.host, code=None)
    rows.append(row("deploy, one file changed (by rsync)", 3, bench.deploy_changed))
    with bench.training():
        rows.append(row("attach to a log", 1.5, bench.attach))
        rows.append(row("re-attach after a break, by itself", 1.5, bench.attach_again))
        rows.append(row("Ctrl-C detaches", 0.2, bench.detach))
    rows.append(row("cancel, verified", GRACE_S + 2, bench.cancel, 2))
    rows.append(row("cancel of a job that does not react, verified", GRACE_S + 2, bench.cancel_deaf, 2))
    say("a package index on the box: some minutes")
    bench.has_its_own_index(trusted)
    rows.append(row("first deploy, PyTorch there, local index", 90, bench.first_deploy, 1))
    return rows


# --- the box and the connection ---


def certificates() -> Path:
    """Return what this machine trusts, which may be a proxy that looks into TLS."""
    by_variable = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    return Path(by_variable or ssl.get_default_verify_paths().cafile or os.devnull)


def make_bench(folder: Path, trusted: Path, stack: ExitStack, say: Callable[[str], None]) -> tuple[Bench, FarLine]:
    docker = Docker() if not Docker().answers() else stack.enter_context(engine.installed_engine())
    base = os.environ.get("BASE_IMAGE") or engine.make_base(docker)
    (folder / "laptop").mkdir(parents=True)
    laptop = Laptop.make(folder / "laptop")
    network = stack.enter_context(rig.network(docker))
    box = stack.enter_context(rig.bare_box(docker, folder / "bare-box", laptop, base, network, trusted))
    line = stack.enter_context(rig.line_through(network))
    laptop.add(box.name, box.entry)
    job = tiny.job(tiny.write_rows(laptop.folder / "rows"))
    job["sft"] |= {"max_updates": 1_000_000, "epochs": 100_000}
    job["checkpoint"] = {"every_updates": 200, "grace_s": GRACE_S}
    (laptop.folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    say("deploying for the first time: some minutes")
    seconds = laptop.fab("deploy", "--host", box.name, timeout_s=1800).seconds
    say(f"  in {seconds:.0f} s")
    return Bench(laptop, box, laptop.folder / "job.yaml"), line


def machine() -> str:
    system = f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs"
    return f"{system}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--round-trip", type=float, default=0.1, metavar="SECONDS", help="of the connection")
    parser.add_argument("--times", type=int, default=5, help="how often each is measured, far and near in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    options, say = parser.parse_args(), console_on(sys.stderr).print
    with tempfile.TemporaryDirectory(prefix="remote-bench-") as folder, ExitStack() as stack:
        trusted = certificates()
        bench, line = make_bench(Path(folder), trusted, stack, say)
        rows = measure(bench, line, options.round_trip / 2, options.times, trusted, say)
    out = console_on(sys.stdout)
    out.width = TABLE_WIDTH
    out.print(f"$ python {shlex.join(sys.argv)}\n{machine()}\n")
    far = f"{options.round_trip * 1000:g} ms round trip"
    table = Table("", far, "from, to", "near", "round trips", "target", "", box=boxes.SIMPLE)
    for row in rows:
        table.add_row(*row.cells(options.round_trip))
    out.print(table, soft_wrap=False, crop=False)
    if options.json:
        numbers = {"machine": machine(), "command": sys.argv, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return 0 if all(row.is_met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
