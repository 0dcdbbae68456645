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

# --- where a process runs: boxes may share a folder, over a network disk or as containers of one machine ---------------

QUIET_S=60 # a heartbeat comes each second; this much for two boxes' clocks that differ
LISTEN=50  # tenths of a second in which a heartbeat is heard

# shellcheck disable=SC2329 # not each script needs it
place() { # sets boot, namespace, host: where process numbers mean what they mean here
    read_line /proc/sys/kernel/random/boot_id
    boot=$value
    namespace=$(readlink /proc/self/ns/pid 2>/dev/null)
    namespace=${namespace#*[}
    namespace=${namespace%]}
    read_line /proc/sys/kernel/hostname
    host=$value
    case $host in '' | *[!A-Za-z0-9._-]*) host=$(printf %s "${host:-no-name}" | tr -c 'A-Za-z0-9._-' _) ;; esac
    namespace=${namespace:-$host} # a system that does not tell: still one word, which another host does not share
}

# shellcheck disable=SC2329 # not each script needs it
sight() { # LINE of a `boot` file: BOOT [NAMESPACE HOST]   sets their_host, and where:
    # here: its processes can be seen. before: this host has restarted since, if it is this host; away: another one
    set -f
    # shellcheck disable=SC2086
    set -- $1
    set +f
    their_host=${3-}
    if [ "${1-}" = "$boot" ] && { [ -z "${2-}" ] || [ "$2" = "$namespace" ]; }; then
        where=here
    elif [ -z "$their_host" ] || [ "$their_host" = "$host" ]; then
        where=before
    else
        # shellcheck disable=SC2034 # for those who read this file
        where=away
    fi
}

heard='' heard_at=0

# shellcheck disable=SC2329 # not each script needs it
hears() { # HEARTBEAT   of a job that cannot be seen from here: whether it lives, after `sight`
    read_line "$1"
    is_number "$value" || return 1
    now=$(date +%s)
    if [ -n "$heard" ]; then # as often as a follower looks
        [ "$value" = "$heard" ] || heard_at=$now
        heard=$value
        silence=$((LISTEN / 5))
        [ "$where" != away ] || silence=$QUIET_S
        [ $((now - heard_at)) -lt $silence ]
        return
    fi
    heard=$value heard_at=$now
    age=$((now - value))
    # A job of another host may live although it was silent just now. One of this host has ended, unless another host has the same name.
    [ "$where" != away ] || [ ${age#-} -gt $QUIET_S ] || return 0
    tenth=0
    while [ $tenth -lt $LISTEN ]; do
        sleep 0.1 2>/dev/null || { sleep 1 && tenth=$((tenth + 9)); }
        tenth=$((tenth + 1))
        read_line "$1"
        [ "$value" = "$heard" ] || return 0
    done
    heard_at=0
    return 1
}
