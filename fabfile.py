"""The file that Fabric reads: `fab --list` shows the verbs, `fab --help VERB` explains one."""

from fabric.main import program

from remote.tasks import ns
from remote.verbs.command_line import mend_call

__all__ = ["ns"]

mend_call(program, ns)
