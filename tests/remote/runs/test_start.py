"""What is said of a box that does not start a job. Expected texts by hand."""

from __future__ import annotations

from remote.runs.start import busy


def test_a_name_that_the_box_sends_is_quoted_in_a_command() -> None:
    target = "--host gpu-box --run '$(touch pwned);x'"
    error = busy("gpu-box", "$(touch pwned);x")
    assert error.hint == f"watch it with `fab logs --follow {target}`, end it with `fab cancel {target}`"
