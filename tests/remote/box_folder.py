"""Our folder on a box, as deploy, the supervisor and training leave it; its content is made up."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

from jobs.run_dir import RunDir

HOSTILE = ["a b", "a'; echo x; '", '"$(touch pwned)" `id`', "-rf", "a\\nb", "ü*?[x]", "#x;&|<>"]


def content(seed: object, size: int) -> bytes:
    """Bytes that resemble nothing."""
    return random.Random(repr(seed)).randbytes(size)


class BoxFolder:
    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("runs", "cache", "requests", "code/0123456789abcdef", "env"):
            (root / name).mkdir(parents=True)
        (root / ".rlhf-box").touch()

    def run(self, name: str = "tiny") -> RunDir:
        run = RunDir(self.root / "runs" / name)
        (run.path / "job").mkdir(parents=True)
        run.job_file.write_text("name: tiny\n")
        run.log.write_bytes(b"rank 0: hello\rrank 0: half a li")
        self.event(run, "plan")
        return run

    def event(self, run: RunDir, kind: str, *, end: str = "\n") -> None:
        with run.events.open("a") as file:
            file.write(json.dumps({"schema": 1, "kind": kind}) + end)

    def step(
        self, run: RunDir, number: int, *, models: tuple[str, ...] = ("model",), size: int = 300_000, seed: object = ""
    ) -> None:
        """A complete one."""
        step = run.step(number)
        shutil.rmtree(step.path, ignore_errors=True)
        for name in models:
            (step.path / name / "sub").mkdir(parents=True)
            (step.path / name / "model.safetensors").write_bytes(content((number, name, seed), size))
            (step.path / name / "config.json").write_text("{}\n")
            (step.path / name / "sub" / "empty").touch()
        step.fields.write_text("{}\n")
        step.complete.write_text(json.dumps({"kind": "end", "step": number, "seed": repr(seed)}))

    def checkpoint(
        self, run: RunDir, number: int, update: int, *, shards: int = 3, size: int = 200_000, complete: bool = True
    ) -> Path:
        """Beside it an older one is removed, as training does it."""
        step, folder = run.step(number), run.step(number).checkpoint(update)
        folder.mkdir(parents=True)
        step.fields.write_text("{}\n")
        files = {f"tensors-{shard:03}.safetensors": content((update, shard), size) for shard in range(shards)} | {
            "state.json": b'{"update": 1}'
        }
        for name, data in files.items():
            (folder / name).write_bytes(data)
        if complete:
            marks = {
                name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
            }
            (folder / "complete.json").write_text(json.dumps({"schema": 1, "files": marks}, indent=1) + "\n")
            for other in step.checkpoints.iterdir():
                if other != folder:
                    (other / "complete.json").unlink(missing_ok=True)
                    shutil.rmtree(other)
        return folder

    def job(self, run: str, request: str, pid: int) -> None:
        """As a supervisor that is this process claims the box."""
        slot = self.root / "slot"
        slot.mkdir()
        (self.root / "requests" / request).mkdir()
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        for name, value in {"run": run, "request": request, "pid": str(pid), "start": stat[19], "boot": boot}.items():
            (slot / name).write_text(f"{value}\n")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file in it but what fetch notes for itself."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".fetched.json")
    return {os.fsdecode(os.fsencode(path.relative_to(folder).as_posix())): path.read_bytes() for path in found}
