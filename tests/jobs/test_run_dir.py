from __future__ import annotations

from pathlib import Path

from jobs.run_dir import RunDir, StepDir


def test_every_path_of_a_run() -> None:
    run = RunDir(Path("runs/my run"))
    assert run.name == "my run"
    assert {
        name: str(getattr(run, name))
        for name, value in vars(RunDir).items()
        if isinstance(value, property) and name != "name"
    } == {
        "job_file": "runs/my run/job.yaml",
        "id": "runs/my run/id",
        "format": "runs/my run/format",
        "events": "runs/my run/events.jsonl",
        "log": "runs/my run/train.log",
        "report": "runs/my run/report.html",
        "tensorboard": "runs/my run/tensorboard",
        "wandb": "runs/my run/wandb",
        "chats": "runs/my run/chats",
        "tokenizer": "runs/my run/tokenizer",
        "lock": "runs/my run/job/lock",
        "cancelled": "runs/my run/job/cancelled",
        "fitted": "runs/my run/job/fitted.json",
        "redo": "runs/my run/job/redo.json",
        "request": "runs/my run/job/request",
        "supervisor": "runs/my run/job/pid",
        "process": "runs/my run/job/process",
        "container": "runs/my run/job/container",
        "started": "runs/my run/job/started",
        "heartbeat": "runs/my run/job/heartbeat",
        "ended": "runs/my run/job/ended",
        "exit": "runs/my run/job/exit",
        "output": "runs/my run/job/output",
    }


def test_every_path_of_a_step() -> None:
    step = RunDir(Path("/r")).step(3)
    assert step == StepDir(Path("/r/step3"))
    assert {name: str(getattr(step, name)) for name, value in vars(StepDir).items() if isinstance(value, property)} == {
        "fields": "/r/step3/fields.json",
        "complete": "/r/step3/complete.json",
        "model": "/r/step3/model",
        "model_ema": "/r/step3/model_ema",
        "rows": "/r/step3/rows.json",
        "reward_scale": "/r/step3/model/reward_scale.json",
        "checkpoints": "/r/step3/checkpoints",
        "best": "/r/step3/best",
    }
    assert str(step.checkpoint(120)) == "/r/step3/checkpoints/update-120"
