"""The file that Fabric reads: `fab --list` shows the verbs, `fab --help VERB` explains one."""

from fabric import Config
from fabric.main import program

from remote import tasks
from remote.verbs.command_line import mend_call, words_of

# OpenSSH alone reads an ssh configuration (remote/ssh/openssh.py). Fabric would read the user's
# before any verb, and end with a traceback at what paramiko cannot parse: a byte that is not UTF-8,
# `Match final`.
Config.load_ssh_config = lambda self: None

__all__ = ["ns"]

ns = tasks.verbs(words_of(program))
mend_call(program, ns, tasks.FILES)
