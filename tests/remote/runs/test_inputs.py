from __future__ import annotations

from pathlib import Path

import pytest

from jobs.errors import ToolkitError
from jobs.spec import Job, load_job, parse_job
from remote.runs.inputs import job_on_box, pack

CHECKOUT = Path(__file__).parents[3]


def job(*settings: str) -> Job:
    return load_job("demo", settings)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    data = tmp_path / "my data"
    (data / ".cache").mkdir(parents=True)
    (data / ".cache/x").write_text("stays at home")
    (data / "train.jsonl").write_text('{"prompt": "a"}\n')
    (data / "test.jsonl").write_text('{"prompt": "b"}\n')
    return tmp_path


def test_what_goes_with_the_code_or_comes_from_the_hub_does_not_travel(here: Path) -> None:
    assert pack(job(), here, CHECKOUT) == []
    assert pack(job("data.datasets=[Dahoas/rm-static]", "actor.model=facebook/opt-1.3b"), here, CHECKOUT) == []


@pytest.mark.parametrize("name", ["my data", "./my data"])
def test_a_folder_travels_by_its_content(here: Path, name: str) -> None:
    (luggage,) = pack(job(f"data.datasets=['{name}']"), here, CHECKOUT)
    assert (luggage.path, luggage.tree.size_bytes) == (here / "my data", 32)
    assert [file.name for file in luggage.tree.files] == ["my data/test.jsonl", "my data/train.jsonl"]
    elsewhere = here / "other" / "my data"
    elsewhere.mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl"):
        (elsewhere / name).write_bytes((here / "my data" / name).read_bytes())
    assert pack(job(f"data.datasets=['{elsewhere}']"), here, CHECKOUT)[0].tree.key == luggage.tree.key
    (elsewhere / "test.jsonl").write_text('{"prompt": "c"}\n')
    assert pack(job(f"data.datasets=['{elsewhere}']"), here, CHECKOUT)[0].tree.key != luggage.tree.key


def test_a_file_and_a_local_model_travel(here: Path) -> None:
    model = here / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    packed = pack(
        job("data.datasets=['my data/train.jsonl', Dahoas/rm-static]", "critic.model=./model"), here, CHECKOUT
    )
    assert [luggage.path.name for luggage in packed] == ["train.jsonl", "model"]
    text = job_on_box(
        job("data.datasets=['my data/train.jsonl', Dahoas/rm-static]", "critic.model=./model"),
        packed,
        "/data/a b/rlhf-box",
    ).decode()
    there = parse_job(text, "job.yaml")
    inputs = "/data/a b/rlhf-box/inputs"
    assert there.data.datasets == (f"{inputs}/{packed[0].tree.key}/train.jsonl", "Dahoas/rm-static")
    assert there.critic.model == f"{inputs}/{packed[1].tree.key}/model"


def test_a_data_set_in_full_travels_by_its_name(here: Path) -> None:
    asked = job("data.datasets=[{name: my data, steps: [1], weight: 2}, {name: a/b, split: train_sft}, my data]")
    (luggage,) = packed = pack(asked, here, CHECKOUT)
    there = parse_job(job_on_box(asked, packed, "/root/rlhf").decode(), "job.yaml").data.entries
    on_box = luggage.on_box("/root/rlhf")
    assert [(entry.name, entry.split, entry.steps, entry.weight) for entry in there] == [
        (on_box, None, (1,), 2.0),
        ("a/b", "train_sft", None, 1.0),
        (on_box, None, None, 1.0),
    ]


def test_models_of_ones_own_travel_in_place_of_those_of_the_steps(here: Path) -> None:
    for name in ("base", "sft", "rm", "judge"):
        (here / name).mkdir()
        (here / name / "config.json").write_text(f'{{"name": "{name}"}}')
    own = job("actor.model=./base", "actor.sft_model=./sft", "critic.model=actor", "critic.reward_model=./rm",
              "ppo.judge_model=./judge")  # fmt: skip
    packed = pack(own, here, CHECKOUT)
    assert [luggage.path.name for luggage in packed] == ["sft", "rm", "judge"]
    there = parse_job(job_on_box(own, packed, "/data").decode(), "job.yaml")
    named = (there.actor.sft_model, there.critic.reward_model, there.ppo.judge_model)
    assert named == tuple(each.on_box("/data") for each in packed)


def test_settings_are_in_the_job_that_travels() -> None:
    there = parse_job(job_on_box(job("ppo.kl_coef=0.05", "name='on'"), [], "/r").decode(), "job.yaml")
    assert (there.ppo.kl_coef, there.name, there.data.datasets) == (0.05, "on", ("rlhf_train/demo/data",))


@pytest.mark.parametrize("name", ["./nothing", "/no/such.jsonl", "gone.jsonl", "~/no such folder"])
def test_a_path_that_is_not_there(here: Path, name: str) -> None:
    with pytest.raises(ToolkitError, match="there is no"):
        pack(job(f"data.datasets=['{name}']"), here, CHECKOUT)


def test_what_cannot_be_read(here: Path) -> None:
    (here / "empty").mkdir()
    with pytest.raises(ToolkitError, match="there is nothing in `empty`"):
        pack(job("data.datasets=[empty]"), here, CHECKOUT)
    (here / "my data" / "round").symlink_to(here / "my data")
    with pytest.raises(ToolkitError, match="round is a link"):
        pack(job("data.datasets=['my data']"), here, CHECKOUT)
    (here / "my data" / "round").unlink()
    (here / "my data" / "away.jsonl").symlink_to(here / "my data" / "train.jsonl")
    with pytest.raises(ToolkitError, match=r"away\.jsonl is a link"):
        pack(job("data.datasets=['my data']"), here, CHECKOUT)


def test_a_pointer_of_git_lfs_is_not_sent(here: Path) -> None:
    model = here / "my model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"  # as Git LFS writes it (its docs/spec.md)
    weights.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n")
    with pytest.raises(ToolkitError, match="is a pointer of Git LFS") as caught:
        pack(job("actor.model='./my model'"), here, CHECKOUT)
    assert caught.value.what == f"{weights} is a pointer of Git LFS, not the file itself"
    assert caught.value.hint.startswith(f"git -C '{model}' lfs pull")
    weights.write_bytes(b"\0" * 100)
    assert len(pack(job("actor.model='./my model'"), here, CHECKOUT)) == 1
