"""`fab --list` shows the verbs, `fab --help VERB` one of them. They stand in remote/tasks.py."""

from remote.tasks import ns

__all__ = ["ns"]
