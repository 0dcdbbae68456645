"""The file that Fabric reads: `fab --list` shows the verbs, `fab --help VERB` explains one."""

from remote.tasks import ns

__all__ = ["ns"]
