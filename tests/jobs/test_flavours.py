"""Which flavour a machine gets. Cards and drivers are those of NVIDIA's lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from env.settings import Flavour, Limits, load_families
from jobs.errors import ExitCode, ToolkitError
from jobs.fitness import Gpu
from jobs.flavours import choose_flavour, flavours_without, model_type_of
from jobs.spec import JOBS_FOLDER, load_job

LIMITS = Limits.load()
V100, T4, RTX_4090 = Gpu("Tesla V100", "7.0"), Gpu("Tesla T4", "7.5"), Gpu("NVIDIA GeForce RTX 4090", "8.9")
H200, B200, RTX_5090 = Gpu("NVIDIA H200", "9.0"), Gpu("NVIDIA B200", "10.0"), Gpu("NVIDIA GeForce RTX 5090", "12.0")
NEW, OLD = "580.95.05", "535.183.01"
JOBS = sorted(file.stem for file in JOBS_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize(
    ("cards", "driver", "name", "why"),
    [
        ((), None, "cu118", "the default"),
        ((RTX_4090,), NEW, "cu118", "the default"),
        ((H200,), OLD, "cu118", "the default"),
        ((V100,), NEW, "cu118", "the default"),
        ((T4,), None, "cu118", "the default"),
        ((Gpu("a card"),), None, "cu118", "the default"),  # nothing is known that speaks against it
        (
            (RTX_5090,),
            NEW,
            "cu130",
            "cu118 does not run here, since NVIDIA GeForce RTX 5090 (compute capability 12.0) is newer than the 9.0 "
            "that this build for CUDA 11.8 knows",
        ),
        (
            (B200, B200),
            NEW,
            "cu130",
            "cu118 does not run here, since NVIDIA B200 (compute capability 10.0) is newer than the 9.0 that this "
            "build for CUDA 11.8 knows",
        ),
    ],
)
def test_the_first_that_drives_the_cards(cards: tuple[Gpu, ...], driver: str | None, name: str, why: str) -> None:
    choice = choose_flavour(LIMITS, cards, driver)
    assert (choice.flavour.name, choice.why) == (name, why)
    assert str(choice) == f"{name}: {why}"


def test_the_jobs_reason_comes_first() -> None:
    choice = choose_flavour(LIMITS, (RTX_4090,), NEW, cannot={"cu118": "transformers 4.46 has no Qwen3"})
    assert str(choice) == "cu130: cu118 does not run here, since transformers 4.46 has no Qwen3"


def test_a_wish_is_taken_or_refused_with_the_call_that_works() -> None:
    assert choose_flavour(LIMITS, (RTX_4090,), NEW, wish="cu130").flavour.name == "cu130"
    with pytest.raises(ToolkitError) as refused:
        choose_flavour(LIMITS, (RTX_5090,), NEW, wish="cu118")
    assert (refused.value.exit_code, refused.value.hint) == (ExitCode.UNFIT, "--flavour cu130 does")
    with pytest.raises(ToolkitError, match="there is no flavour `cu121`") as unknown:
        choose_flavour(LIMITS, (), None, wish="cu121")
    assert unknown.value.hint == "one of: cu118, cu130"


@pytest.mark.parametrize(
    ("cards", "driver", "why", "hint"),
    [
        (
            (RTX_5090,),
            "570.86.10",
            "cu130: its driver 570.86.10 is older than the 580.65.06 that CUDA 13.0 needs",
            "install a newer driver on the host, or take another box",
        ),
        ((V100, B200), NEW, "cu130: Tesla V100 (compute capability 7.0) is older than the 7.5", "take another box"),
        ((Gpu("Tesla P100", "6.0"),), NEW, "cu118: Tesla P100 (compute capability 6.0) is older", "take another box"),
    ],
)
def test_where_none_runs_each_has_its_reason(cards: tuple[Gpu, ...], driver: str, why: str, hint: str) -> None:
    with pytest.raises(ToolkitError) as refused:
        choose_flavour(LIMITS, cards, driver)
    assert refused.value.exit_code == ExitCode.UNFIT
    assert why in refused.value.why and refused.value.hint == hint


def test_a_job_whose_model_a_flavour_lacks(tmp_path: Path) -> None:
    qwen3 = ["actor.model={config: {model_type: qwen3}}", "actor.tokenizer_vocabulary=320", "critic.model=actor"]
    assert flavours_without(load_job("demo", qwen3)) == {"cu118": "its transformers has no Qwen 3"}
    assert flavours_without(load_job("demo")) == flavours_without(load_job("opt-1.3b")) == {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "smollm3"}))
    assert list(flavours_without(load_job("opt-1.3b", [f"critic.model={tmp_path}"]))) == ["cu118"]
    assert list(flavours_without(load_job("opt-1.3b", [f"ppo.judge_model={tmp_path}"]))) == ["cu118"]


@pytest.mark.parametrize(
    ("settings", "without"),
    [
        (["flavours=[cu130]"], {"cu118": "the job names cu130 alone"}),
        (["flavours=[cu130, cu118]"], {}),
        (["flavours=[]"], {}),
        (["actor.model=Qwen/Qwen3-1.7B"], {"cu118": "its transformers has no Qwen 3"}),
        (["actor.model=qwen/qwen2.5-0.5b"], {}),  # the hub takes both
        (["actor.model=HuggingFaceTB/SmolLM2-135M"], {}),
        (["critic.model=HuggingFaceTB/SmolLM3-3B"], {"cu118": "its transformers has no SmolLM 3"}),
        (["actor.model=somebody/qwen3"], {}),  # its name says nothing: its config.json will
        (
            ["actor.model=Qwen/Qwen3-1.7B", "flavours=[cu118]"],
            {"cu118": "its transformers has no Qwen 3", "cu130": "the job names cu118 alone"},
        ),
    ],
)
def test_a_job_says_its_flavours_or_its_models_do(settings: list[str], without: dict[str, str]) -> None:
    assert flavours_without(load_job("opt-1.3b", settings)) == without


def test_a_job_that_leaves_no_flavour_is_told_to_change() -> None:
    change = "choose another model, or change `flavours` in the job file"
    old = flavours_without(load_job("demo", ["flavours=[cu118]"]))
    with pytest.raises(ToolkitError) as refused:
        choose_flavour(LIMITS, (RTX_5090,), NEW, cannot=old)
    assert refused.value.why.endswith("; cu130: the job names cu118 alone")
    assert refused.value.hint == f"take another box; or {change}"
    none = flavours_without(load_job("opt-1.3b", ["actor.model=Qwen/Qwen3-1.7B", "flavours=[cu118]"]))
    with pytest.raises(ToolkitError) as hopeless:
        choose_flavour(LIMITS, (RTX_4090,), NEW, cannot=none)
    assert hopeless.value.hint == change


@pytest.mark.parametrize("name", JOBS)
def test_every_job_that_we_ship_runs_in_the_flavours_that_it_names(name: str) -> None:
    """Its models are known without the hub: a wrong flavour is refused before a download."""
    job = load_job(name)
    types = {model_type_of(source) for source in job.sources}
    assert types <= load_families().keys(), "add how their names on the hub begin to env/families.toml"
    have = [flavour for flavour in Flavour.load_all() if all(flavour in load_families()[t].flavours for t in types)]
    assert set(job.flavours or have) <= set(have)
    assert [flavour for flavour in have if flavour not in flavours_without(job)] == list(job.flavours or have) != []


def test_every_family_has_a_flavour_that_is_there() -> None:
    named = {name for family in load_families().values() for name in family.flavours}
    assert named == set(Flavour.load_all())
