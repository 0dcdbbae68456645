# shellcheck shell=sh
# Functions that several scripts of this folder need. In a script that is sent by itself, this text replaces the line that reads it
# (remote/scripts.py joins them). A script that is on the box with our code reads this file from its own folder.
# For dash, bash and busybox, also under `set -eu`. A function answers by its exit code, and by the variables named in its comment.

has() { command -v "$1" >/dev/null 2>&1; }

read_line() { # FILE   sets value; the line may lack its newline
    value=''
    { IFS= read -r value <"$1"; } 2>/dev/null || [ -n "$value" ]
}

is_number() { # digits, and few enough for arithmetic
    case $1 in '' | *[!0-9]*) return 1 ;; esac
    [ ${#1} -le 15 ]
}

fields_of() { # PID   sets state, parent, since: fields 3, 4 and 22 of its stat
    { IFS= read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
    set -f
    # shellcheck disable=SC2086
    set -- ${stat##*) }
    set +f
    # shellcheck disable=SC2034 # not each script reads parent
    state=${1-} parent=${2-} since=${20-}
}

is_alive() { # PID   as fields_of; a process that only waits to be reaped has ended
    fields_of "$1" || return 1
    case $state in [ZX]*) return 1 ;; esac
}

is_running() { # PID SINCE   this very process: numbers are reused, so its start time is compared, too
    is_number "$1" && is_alive "$1" && [ "$since" = "$2" ]
}

command_of() { # PID   -> its command line
    { tr '\000\n' '  ' <"/proc/$1/cmdline"; } 2>/dev/null | tr -d '\000-\037\177' | cut -c 1-200
}

free_kb() { # FOLDER   -> the free space of its disk
    df -P -k "$1" 2>/dev/null | sed -n '2s/.* \(-\{0,1\}[0-9]\{1,\}\) \{1,\}[0-9-]\{1,\}%\{0,1\} .*/\1/p'
}
