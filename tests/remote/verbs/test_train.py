"""What `fab train` refuses before it sends anything."""

from __future__ import annotations

import pytest

from jobs.errors import ExitCode, ToolkitError
from jobs.spec import load_job
from remote.runs.deployed import Deployment
from remote.verbs.train import refuse_other_flavour

QWEN3 = load_job("demo", ["actor.model={config: {model_type: qwen3}}"])


def test_a_flavour_that_lacks_the_model_is_refused_with_the_call_that_works() -> None:
    with pytest.raises(ToolkitError) as refused:
        refuse_other_flavour("gpu-box", Deployment("/root", {"flavour": "cu118"}), QWEN3)
    error = refused.value
    assert (error.what, error.why) == (
        "`demo` does not run in flavour cu118, which `gpu-box` has",
        "its transformers has no Qwen 3",
    )
    assert (error.hint, error.exit_code) == ("fab deploy --host gpu-box --flavour cu130", ExitCode.UNFIT)


def test_a_flavour_that_the_job_does_not_name_is_refused_too() -> None:
    with pytest.raises(ToolkitError) as refused:
        refuse_other_flavour("a b", Deployment("/root", {"flavour": "cu118"}), load_job("demo", ["flavours=[cu130]"]))
    assert (refused.value.why, refused.value.exit_code) == ("the job names cu130 alone", ExitCode.UNFIT)
    assert refused.value.hint == "fab deploy --host 'a b' --flavour cu130"


@pytest.mark.parametrize("facts", [{"flavour": "cu130"}, {}])  # {}: deployed before there were flavours
def test_what_has_it_is_taken(facts: dict[str, str]) -> None:
    refuse_other_flavour("gpu-box", Deployment("/root", facts), QWEN3)
