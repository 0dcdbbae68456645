"""This module measures step 3 against its peers, in one run and in turn.

They are TRL's PPO, DeepSpeed-Chat's classes and Hugging Face's generate. Each peer has its own
environment, made once from a list of pinned packages next to its script; the torch build is ours.
All load the same model folders, get the same prompts, and must generate the same number of tokens.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ppo
from benchmarks.figures import Spread, Table
from benchmarks.machine import Where
from benchmarks.work import EOS, PAD, Prompts, Size

HERE = Path(__file__).parent / "peers"
ENVIRONMENTS = Path(__file__).parents[1] / "cache" / "benchmarks"
TORCH_BUILDS = "https://download.pytorch.org/whl"
TARGETS = {False: 1.5, True: 3.0}  # ours against the faster peer, samples a second


@dataclass(frozen=True)
class Peer:
    name: str
    script: str  # of benchmarks/peers/, and the list of its packages
    needs: tuple[str, ...]  # what it imports: where it must be importable
    extra: tuple[tuple[str, str], ...] = ()
    is_whole: bool = True  # all of step 3, not generation alone


PEERS = (
    Peer("TRL 1.12.0", "trl_ppo", ("trl", "datasets")),
    Peer("DeepSpeed-Chat", "deepspeed_chat", ("deepspeed",)),
    Peer("HF generate, dynamic cache", "hf_generate", ("transformers",), (("cache", "dynamic"),), is_whole=False),
    Peer("HF generate, static cache", "hf_generate", ("transformers",), (("cache", "static"),), is_whole=False),
)
DIFFERENCES = (
    "whole update: all that lies between two updates; CPU: the processors' seconds, which others may share",
    "The work is not quite equal. TRL scores with 3 forward passes (its old log-probs are the sampler's), does",
    "not clip gradients, and computes entropies; DeepSpeed-Chat scores with 4, clips, and loops over rows in Python.",
    "Both also compute logits of the prompts, pad every row to the longest prompt (DeepSpeed-Chat: to the limit) and",
    "the longest answer, and train on the whole batch in one pass on a CPU; ours chooses its micro batch. None has",
    "dropout, checkpointing, LoRA or EMA; all sample at temperature 1.",
)


def python_of(peer: Peer, interpreter: str | None, say: Callable[[str], None]) -> str:
    """Return the interpreter that has the peer's packages.

    It is `interpreter` if given, else that of an environment which is made at the first call.
    """
    if interpreter:
        return interpreter
    wanted = (HERE / f"{peer.script}.txt").read_text(encoding="utf-8")
    build = torch.__version__.partition("+")[2] or "cpu"
    key = hashlib.sha256(f"{wanted}{torch.__version__}{sys.version}".encode()).hexdigest()[:12]
    folder = ENVIRONMENTS / f"{peer.script}-{key}"
    python = folder / "bin" / "python"
    if not (folder / "whole").exists():
        say(f"  making an environment for {peer.name}: some minutes, once")
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        patience = ["--retries", "1", "--timeout", "30"]
        environment = {**os.environ, "DS_BUILD_OPS": "0"}
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [*pip, *patience, "--extra-index-url", f"{TORCH_BUILDS}/{build}", f"torch=={torch.__version__}"],
            [*pip, "setuptools", "wheel"],
            [*pip, "--no-build-isolation", "-r", str(HERE / f"{peer.script}.txt")],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                output = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{output}")
        (folder / "whole").touch()
    return str(python)


def prepare(options: Any, say: Callable[[str], None]) -> dict[str, str]:
    """Return the interpreter of each peer that can run."""
    chosen = chosen_interpreter(options)
    able = [peer for peer in PEERS if not missing(peer, options.deepspeed_chat, chosen)]
    return {peer.name: python_of(peer, chosen, say) for peer in able}


def chosen_interpreter(options: Any) -> str | None:
    return sys.executable if options.peers_here else options.python_of_peers


def missing(peer: Peer, checkout: Path | None, interpreter: str | None) -> str:
    """Say why the peer cannot run; "" if it can."""
    if peer.script == "deepspeed_chat" and checkout is None:
        return "name a checkout of DeepSpeedExamples by --deepspeed-chat PATH"
    if interpreter == sys.executable:
        absent = [name for name in peer.needs if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} cannot be imported here" if absent else ""
    return ""


def work_of(
    size: Size, folder: Path, prompts: Prompts, where: Where, updates: int, seed: int, checkout: Path | None
) -> dict[str, Any]:
    """Return the input of a peer's script, as JSON. Its first update does not count."""
    micro_batch = size.micro_batch or size.batch
    return {
        "actor": str(folder / "actor"),
        "critic": str(folder / "critic"),
        "prompts": prompts.ids,
        "max_prompt_tokens": size.prompt_tokens,
        "max_response_tokens": size.response_tokens,
        "batch": size.batch,
        "micro_batch": micro_batch,
        "rollout_batch": size.batch,
        "updates": updates + ppo.WARM_UP,
        "dtype": size.precision,
        "device": where.device,
        "threads": where.threads,
        "learning_rate": 1e-6,
        "seed": seed,
        "pad_id": PAD,
        "eos_id": EOS,
        "checkout": str(checkout) if checkout else None,
    }


def run(peer: Peer, python: str, work: dict[str, Any], folder: Path, where: Where) -> list[dict[str, Any]]:
    """Run a peer in one process, and return the repeats that count."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        work = {**work, **dict(peer.extra), "port": free.getsockname()[1]}
    file = folder / f"{peer.script}.json"
    file.write_text(json.dumps(work), encoding="utf-8")
    command = [python, str(HERE / f"{peer.script}.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=where.environment)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in results]
    if done.returncode or len(lines) != work["updates"]:
        ended = f"{peer.name} ended with {done.returncode} after {len(lines)} repeats"
        raise RuntimeError(f"{ended}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return lines[ppo.WARM_UP :]


def check(name: str, repeats: Sequence[dict[str, Any]], prompts: Prompts) -> None:
    wanted = prompts.prompt_tokens, prompts.answer_tokens
    for repeat in repeats:
        counted = repeat["prompt_tokens"], repeat["answer_tokens"]
        assert counted == wanted, f"{name} counted {counted} tokens of prompts and answers, not {wanted}"


def measure(
    size: Size,
    folder: Path,
    where: Where,
    rounds: int,
    updates: int,
    seed: int,
    *,
    real_lengths: bool,
    options: Any,
    say: Callable[[str], None],
) -> tuple[Prompts, dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Return the prompts, every side's repeats in the order of rounds, and why a peer is absent.

    At real lengths generate alone is left out: the peers' own rollouts use it.
    """
    prompts = ppo.write_work(size, folder, where.device, seed, real_lengths=real_lengths)
    shaped = ppo.lengths_of(size, real_lengths)
    peers = {peer.name: peer for peer in PEERS if peer.is_whole or not real_lengths}
    pythons = {name: python for name, python in prepare(options, say).items() if name in peers}
    chosen = chosen_interpreter(options)
    absent = {
        name: missing(peer, options.deepspeed_chat, chosen) for name, peer in peers.items() if name not in pythons
    }
    checkout = chat_folder(options.deepspeed_chat)
    work = work_of(shaped, folder, prompts, where, updates, seed, checkout)
    sides: dict[str, list[dict[str, Any]]] = {}
    for number in range(1, rounds + 1):
        for name in ("ours", *pythons):
            if name in absent:  # it has failed
                continue
            if name == "ours":
                repeats = ppo.repeats_of(ppo.run(shaped, folder, where, updates), prompts)
            else:
                try:
                    repeats = run(peers[name], pythons[name], work, folder, where)
                except RuntimeError as error:
                    if not options.go_on:
                        raise
                    absent[name] = str(error).strip().splitlines()[-1]
                    continue
            check(name, repeats, prompts)
            sides.setdefault(name, []).extend(repeats)
            key = "total_s" if "total_s" in repeats[0] else "generation_s"
            say(f"  round {number} of {rounds}, {name}: {Spread.of([repeat[key] for repeat in repeats]):.2f} s")
    return prompts, sides, absent


def chat_folder(checkout: Path | None) -> Path | None:
    """Find the package `dschat` in a checkout of DeepSpeedExamples, or of that folder alone."""
    if checkout is None:
        return None
    for folder in (checkout / "applications" / "DeepSpeed-Chat", checkout):
        if (folder / "dschat").is_dir():
            return folder
    raise FileNotFoundError(f"there is no dschat/ in {checkout}")


def verdict(sides: dict[str, list[dict[str, Any]]], target: float, *, by_cpu: bool) -> str:
    """Compare ours with the faster peer, by medians.

    by_cpu: each side has one thread, on processors that others may share.
    """
    complete = {name: repeats for name, repeats in sides.items() if "total_s" in repeats[0]}
    clock, cpu = (
        {name: Spread.of([repeat[key] for repeat in repeats]).median for name, repeats in complete.items()}
        for key in ("total_s", "cpu_s")
    )
    judged = cpu if by_cpu else clock
    rest = [name for name in judged if name != "ours"]
    if not rest:
        return "no peer ran the whole of step 3"
    fastest = min(rest, key=lambda name: judged[name])
    ratio, other = judged[fastest] / judged["ours"], clock if by_cpu else cpu
    other_ratio = min(other[name] for name in rest) / other["ours"]
    return (
        f"ours against the faster peer, {fastest}: {ratio:.2f}x by {'seconds of the CPU' if by_cpu else 'the clock'} "
        f"(target {target:g}x: {'met' if ratio >= target else 'MISSED'}), {other_ratio:.2f}x by {OTHER[by_cpu]}"
    )


OTHER = {True: "the clock, which also runs while others have the processor", False: "seconds of the CPU"}


def table(size: Size, folder: Path, where: Where, options: Any, seed: int, say: Callable[[str], None]) -> Table:
    rows: list[list[str]] = []
    notes: list[str] = []
    numbers: dict[str, Any] = {}
    for real_lengths, name in ppo.LENGTHS.items():
        if options.lengths not in ("both", name.split()[0]):
            continue
        rounds, updates = options.rounds, options.repeats
        if real_lengths:
            rounds, updates = max(1, rounds - 1), max(1, updates - 2)
        say(f"  {name}: {rounds} rounds of {updates} updates")
        place = folder / name.split()[0]
        prompts, sides, absent = measure(
            size, place, where, rounds, updates, seed, real_lengths=real_lengths, options=options, say=say
        )
        rows += [ppo.row(f"{name}, {side}", repeats, size.batch) for side, repeats in sides.items()]
        notes.append(
            f"{name}: {ppo.described(prompts)}, counted and the same for all; "
            f"{rounds} rounds in turn, {updates} updates each after one"
        )
        notes.append(f"  {verdict(sides, TARGETS[real_lengths], by_cpu=where.device == 'cpu')}")
        notes += [f"  {peer} did not run: {why}" for peer, why in absent.items()]
        numbers[name] = sides
    return Table("peers", ppo.COLUMNS, rows, [*notes, *DIFFERENCES], numbers)
