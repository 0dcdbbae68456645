"""This module writes checkpoints to disk whole or not at all, finds, checks and removes them.

It does not depend on what is trained. A checkpoint is a folder `update-N`: tensors by name
(safetensors, in shards), plain values (`state.json`), and a mark with every file's hash
(`complete.json`), written last. While it is being written, the folder is `update-N.partial`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from jobs.run_dir import StepDir
from rlhf_train.disk import read_json, rename, sync, write_json

SCHEMA = 1
SHARD_BYTES = 2**28  # size of a file of tensors, about
WRITERS = 3  # files that are written concurrently


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete on disk."""

    path: Path

    @cached_property
    def state(self) -> dict[str, Any]:
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    @property
    def update(self) -> int:
        return self.state["update"]

    @cached_property
    def _files(self) -> dict[str, Any]:
        """Map each tensor's name to the open file that holds it."""
        opened = [safe_open(str(file), "pt") for file in sorted(self.path.glob("*.safetensors"))]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)

    def tensor(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Copy the tensors named `prefix/...`, by the rest of their names."""
        start = f"{prefix}/"
        return {name.removeprefix(start): self.tensor(name).clone() for name in self._files if name.startswith(start)}

    def close(self) -> None:
        """Close the files: while they are mapped, removing them does not free disk space."""
        self.__dict__.pop("_files", None)


def latest(
    step: StepDir,
    complain: Callable[[str], None],
    inputs: Mapping[str, str] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Saved | None:
    """Return the newest complete checkpoint that was made from `inputs` (None: from any).

    Every file is checked against its hash. `complain` is called for each complete checkpoint that
    is damaged or was made from other inputs.
    """
    for folder in sorted(step.checkpoints.glob("update-*"), key=_update_of, reverse=True):
        marked = read_json(folder / "complete.json") if _update_of(folder) >= 0 else None
        if marked is None:
            continue
        damaged = [name for name, file in marked["files"].items() if _hash(folder / name, beat) != file["sha256"]]
        if damaged:
            complain(f"the checkpoint {folder} is damaged ({', '.join(damaged)}) and not used")
        elif inputs is not None and Saved(folder).state["inputs"] != inputs:
            complain(f"the checkpoint {folder} is not used: the steps before this one were done again after it")
        else:
            return Saved(folder)
    return None


def _update_of(folder: Path) -> int:
    number = folder.name.removeprefix("update-")
    return int(number) if number.isdecimal() else -1


def _hash(path: Path, beat: Callable[[], None]) -> str:
    """Return the file's sha256; "" if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
                beat()
    except OSError:
        return ""
    return digest.hexdigest()


def write(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    state: Mapping[str, Any],
    beat: Callable[[], None] = lambda: None,
) -> int:
    """Write a checkpoint to `folder`, whole or not at all, and return its size in bytes.

    beat: called before each file of tensors. Raises OSError, and then leaves nothing behind.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        for stale in (partial, folder):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        files = _put_shards(partial, _shards(tensors), beat)
        files["state.json"] = _put(partial / "state.json", json.dumps(state).encode())
        sync(partial)
        rename(partial, folder)
        write_json(folder / "complete.json", {"schema": SCHEMA, "files": files})
    except OSError:
        for half in (partial, folder):
            shutil.rmtree(half, ignore_errors=True)
        raise
    return sum(file["size"] for file in files.values())


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        shard[name] = tensor.to("cpu").contiguous()
        held += tensor.numel() * tensor.element_size()
        if held >= SHARD_BYTES:
            yield shard
            shard, held = {}, 0
    if shard:
        yield shard


def _put_shards(
    folder: Path,
    shards: Iterable[dict[str, Tensor]],
    beat: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """Write each shard to a file of its own.

    Several threads copy, hash and sync in turn, since each of these alone leaves the disk idle.
    """
    files: dict[str, dict[str, Any]] = {}
    written: deque[tuple[str, Future[dict[str, Any]]]] = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        for number, shard in enumerate(shards):
            beat()
            name = f"tensors-{number:03}.safetensors"
            written.append((name, pool.submit(lambda path, shard: _put(path, save(shard)), folder / name, shard)))
            if len(written) == WRITERS:  # this bounds the memory
                name, done = written.popleft()
                files[name] = done.result()
        files |= {name: done.result() for name, done in written}
    return files


def _put(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def remove_others(step: StepDir, keep: Path | None) -> None:
    """Remove all checkpoints but `keep`, and what a killed process left half-written."""
    for folder in step.checkpoints.glob("*"):
        if folder != keep:
            # The mark goes first: a removal that is cut short leaves nothing that looks complete.
            with suppress(OSError):
                (folder / "complete.json").unlink()
            shutil.rmtree(folder, ignore_errors=True)


# --- random states ---


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's random generators, as plain values.

    These are Python's, NumPy's, PyTorch's and the GPU's.
    """
    version, numbers, gauss = random.getstate()
    of_numpy: Any = np.random.get_state()
    kind, keys, place, has_gauss, cached = of_numpy
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), place, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        states["cuda"] = _text(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_bytes(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
