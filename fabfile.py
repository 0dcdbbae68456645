"""`fab --list` shows the verbs, `fab --help VERB` one of them. They stand in remote/verbs."""

from remote.tasks import ns

__all__ = ["ns"]
