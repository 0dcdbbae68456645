"""Commands for a box, run by the sh of this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from remote.ssh import commands


def test_a_shell_has_the_programs_of_the_deployed_environment(tmp_path: Path) -> None:
    program = tmp_path / "my env" / "bin" / "tensorboard"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho it runs in $PWD\n")
    program.chmod(0o755)
    here = {"PATH": "/usr/bin:/bin", "SHELL": "/bin/sh", "HOME": str(tmp_path)}

    def said() -> str:
        argv = commands.shell(str(tmp_path))
        return subprocess.run(
            argv, input="tensorboard --logdir runs\n", env=here, capture_output=True, text=True, check=False
        ).stdout

    assert said() == ""
    (tmp_path / "deployed").write_text(f"code 0123\npython {program.with_name('python')}\n")
    assert said() == f"it runs in {tmp_path}\n"
