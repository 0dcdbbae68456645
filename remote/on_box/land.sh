#!/bin/sh
# The part of a deploy that runs on the box, other than sending files. It is sent with each call, so nothing of ours need be there yet. Its
# verbs, answers and exit codes: PROTOCOL.md.
#
# Unfinished files have a name of their own (.partial, .new), and get their real name by a rename. So a call that is killed leaves nothing
# that looks complete. Files are removed only below a ROOT that has our marker.

LC_ALL=C
export LC_ALL
umask 022
# shellcheck source=remote/on_box/lib.sh
. "$(dirname -- "$0")/lib.sh"
no_owner_s=60 # a lock without an owner file: its maker was killed in between, or is about to write the file

refuse() { # WHAT HINT
    printf 'refused %s\nhint %s\n' "$1" "$2"
    exit 3
}

word_of() { # FILE KEY   sets value: the rest of the line that begins with KEY
    value=$(sed -n "s/^$2 //p" "$1" 2>/dev/null | sed q)
}

identity() { # sets identity: it changes when the box is restarted, is another one, or has other cards
    read_line /proc/sys/kernel/random/boot_id
    identity=$value
    read_line /proc/sys/kernel/hostname
    since=''
    fields_of 1
    identity="$identity $value $since"
    for card in /dev/nvidia[0-9]*; do [ ! -e "$card" ] || identity="$identity ${card#/dev/}"; done
}

is_full() { # FOLDER
    free=$(free_kb "$1")
    [ "${free:-1025}" -le 1024 ]
}

failed() { # WHAT FOLDER   writing has failed
    ! is_full "$2" || refuse "the disk is full at $2" "make room there, or name another data_folder in boxes.yaml"
    refuse "$1" "check that $2 can be written to"
}

# --- look ----------------------------------------------------------------------------------------------------------

look() { # ROOT FP ENVIRONMENT IMAGE
    identity
    echo "identity $identity"
    echo "clock $(date +%s)"
    for tool in rsync tar setsid; do ! has $tool || echo "tool $tool"; done
    if [ -f "$1/.rlhf-box" ]; then
        echo 'root ours'
        echo "free $(free_kb "$1")"
        ! is_whole_code "$1/code/$2" || echo 'code here'
        [ "$3" = - ] || { [ -f "$1/env/$3/complete" ] && [ -x "$1/env/$3/bin/python" ] && echo 'environment here'; }
        [ "$4" = - ] || { docker image inspect "$4" >/dev/null 2>&1 && echo 'image here'; }
        sed 's/^/deployed /' "$1/deployed" 2>/dev/null
        word_of "$1/deployed" code
        ! is_whole_code "$1/code/$value" || echo "like $value"
        ! read_line "$1/slot/run" || echo "slot $value"
        say_lock "$1"
    elif holds_others "$1"; then
        echo 'root strange'
    else
        echo 'root none'
    fi
    echo end
}

holds_others() { find "$1" -mindepth 1 -maxdepth 1 ! -name '.rlhf-box*' 2>/dev/null | grep -q .; }

is_whole_code() { case $1 in */) return 1 ;; *) [ -f "$1/remote/on_box/land.sh" ] ;; esac }

say_lock() { # ROOT
    [ -d "$1/lock" ] || return 0
    sed 's/^/lock /' "$1/lock/owner" 2>/dev/null
    ! read_line "$1/lock/renewed" || echo "lock renewed $value"
    ! worker_lives "$1/lock" || echo "lock worker $worker"
    echo 'lock held'
}

worker_lives() { # LOCK   sets worker: the process on the box that works for the lock's owner
    worker=''
    { read -r worker began <"$1/worker"; } 2>/dev/null || return 1
    is_running "$worker" "$began"
}

# --- the lock ------------------------------------------------------------------------------------------------------

lock() { # ROOT TOKEN DEAD SECONDS FP LINE...
    root=$1 token=$2 dead=$3 seconds=$4 code=$5
    shift 5
    [ -f "$root/.rlhf-box" ] || mark "$root" "$token" || failed "cannot make $root" "${root%/*}"
    identity
    until mkdir "$root/lock" 2>/dev/null; do
        [ -d "$root/lock" ] || failed "cannot make $root/lock" "$root"
        take_over
    done
    now=$(date +%s)
    put "$root/lock/owner" "$@" "when $now" "expires $((now + seconds))" "box $identity" "token $token" || unlocked_failure "cannot write to $root/lock"
    mkdir -p "$root/code" "$root/env" "$root/inputs" "$root/runs" "$root/cache/tmp" "$root/requests" || unlocked_failure "cannot make folders in $root"
    [ -d "$root/secrets" ] || mkdir -m 700 "$root/secrets" || unlocked_failure "cannot make folders in $root"
    for old in "$root"/code/*.partial "$root"/code/*.temp; do
        [ "$old" = "$root/code/$code.partial" ] || rm -rf "$old"
    done
    # Files of an earlier call are whole: rsync keeps unfinished ones elsewhere.
    rm -rf "$root/code/$code.temp"
    is_whole_code "$root/code/$code" || mkdir -p "$root/code/$code.partial" "$root/code/$code.temp" || unlocked_failure "cannot make folders in $root"
    echo locked
}

mark() { # ROOT TOKEN   two calls may do this concurrently
    if holds_others "$1" && [ ! -f "$1/.rlhf-box" ]; then
        refuse "$1 exists, and is not ours" "move it away, or name another data_folder in boxes.yaml"
    fi
    mkdir -p "$1" && put "$1/.rlhf-box.$2" 'made by rlhf-box: fab purge removes this folder' && mv "$1/.rlhf-box.$2" "$1/.rlhf-box"
}

put() { # FILE LINE...   all of it or nothing
    file=$1
    shift
    { printf '%s\n' "$@" >"$file.new"; } 2>/dev/null && mv "$file.new" "$file"
}

unlocked_failure() { # WHAT
    rm -rf "$root/lock"
    failed "$1" "$root"
}

take_over() { # an existing lock: remove it if it is dead, else end here
    word_of "$root/lock/owner" token
    theirs=$value now=$(date +%s) why=''
    if [ -z "$theirs" ]; then
        made=$(stat -c %Y "$root/lock" 2>/dev/null) || return 0 # gone
        [ $((now - made)) -lt $no_owner_s ] || why='nobody wrote down who has it'
    else
        word_of "$root/lock/owner" expires
        expires=$value
        ! read_line "$root/lock/renewed" || [ "$value" -le "$expires" ] 2>/dev/null || expires=$value
        word_of "$root/lock/owner" box
        if [ "$value" != "$identity" ] && [ "$(second_word "$value")" = "$(second_word "$identity")" ]; then # not another host that shares ROOT
            why='the box was restarted since'
        elif [ "$theirs" = "$dead" ]; then
            why='its deploy was killed'
        elif [ "$now" -gt "$expires" ] 2>/dev/null; then
            why='it has expired'
        fi
    fi
    if [ -z "$why" ]; then
        echo busy
        echo "clock $now"
        say_lock "$root"
        exit 5
    fi
    stale=$root/lock.stale.$token
    rm -rf "$stale"
    mv "$root/lock" "$stale" 2>/dev/null || return 0
    word_of "$stale/owner" token
    if [ "$value" != "$theirs" ]; then # another call took it over just now, and this is its lock
        mv "$stale" "$root/lock"
        return 0
    fi
    if worker_lives "$stale"; then end_worker; fi
    echo "took_over $why"
    sed 's/^/lock /' "$stale/owner" 2>/dev/null
    rm -rf "$stale"
}

end_worker() { # environment.sh ends the processes that it has started
    kill -TERM "$worker" 2>/dev/null
    for tenth in 1 2 3 4 5 6 7 8 9 10; do
        is_running "$worker" "$began" || return 0
        sleep 0.5 2>/dev/null || sleep 1
    done
    kill -KILL "$worker" 2>/dev/null
    : "$tenth"
}

second_word() { # LINE   -> of an identity: the host's name
    set -f
    # shellcheck disable=SC2086
    set -- $1
    set +f
    printf %s "${2-}"
}

check_token() { # ROOT TOKEN
    word_of "$1/lock/owner" token
    [ "$value" != "$2" ] || return 0
    echo lost
    say_lock "$1"
    exit 5
}

unlock() { # ROOT TOKEN|any
    [ -f "$1/.rlhf-box" ] || return 0
    [ "$2" = any ] || check_token "$1" "$2"
    say_lock "$1"
    if [ "$2" = any ] && worker_lives "$1/lock"; then end_worker; fi
    rm -rf "$1/lock"
}

# --- what arrived --------------------------------------------------------------------------------------------------

digest() { sha256sum | cut -c 1-64; }

fingerprint() ( # FOLDER   as remote/deploy/sync.py has it
    cd "$1" || exit 1
    {
        find . -type f -print0 | sort -z | digest
        find . -type f -perm -100 -print0 | sort -z | digest
        find . -type f -print0 | sort -z | xargs -0 -r stat -c %s | digest
        find . -type f -print0 | sort -z | xargs -0 -r cat | digest
        find . ! -type f ! -type d -print0 | sort -z | digest
        find . -type l -print0 | sort -z | xargs -0 -r -n 1 readlink | digest
    } | digest
)

land() { # FOLDER WANTED [ROOT TOKEN LINE...]
    folder=$1 wanted=$2
    shift 2
    [ $# -eq 0 ] || check_token "$1" "$2"
    if [ ! -e "$folder" ]; then
        found=$(fingerprint "$folder.partial") || refuse "there is no $folder.partial" "the same command sends it again"
        if [ "$found" != "$wanted" ]; then
            echo "differs $found"
            exit 4
        fi
        mv "$folder.partial" "$folder" || failed "cannot rename $folder.partial" "${folder%/*}"
    fi
    rm -rf "$folder.partial" "$folder.temp"
    echo landed
    [ $# -lt 3 ] || settle "$@"
}

# --- the end -------------------------------------------------------------------------------------------------------

settle() { # ROOT TOKEN LINE...
    root=$1
    check_token "$1" "$2"
    shift 2
    word_of "$root/deployed" code
    before=$value
    put "$root/deployed" "$@" "time $(date +%s)" || unlocked_failure "cannot write $root/deployed"
    word_of "$root/deployed" runtime
    runtime=$value
    # The container never runs as root; its files belong to the user that it runs as.
    if [ "$runtime" = docker ] && [ "$(id -u)" = 0 ]; then
        for folder in runs cache inputs secrets; do
            [ "$(stat -c %u "$root/$folder")" = 1000 ] || chown -R 1000:1000 "$root/$folder"
        done
    fi
    # A job keeps the code and the environment with which it was started: while a job is there, nothing is removed. A supervisor first
    # takes the slot and then reads `deployed`, which is written above: so none can still be about to use what is removed now.
    [ -e "$root/slot" ] || prune
    rm -rf "$root"/code/*.partial "$root"/code/*.temp
    rm -rf "$root/lock"
    echo settled
}

prune() {
    word_of "$root/deployed" code
    for old in "$root"/code/*; do
        case ${old##*/} in
            "$value" | "$before") ;;
            *[!0-9a-f]*) ;;
            ????????????????) rm -rf "$old" && echo "pruned code ${old##*/}" ;;
        esac
    done
    word_of "$root/deployed" environment
    for old in "$root"/env/*; do
        name=${old##*/}
        case ${name%%.*} in
            "$value") ;;
            *[!0-9a-f]*) ;;
            ????????????????) rm -rf "$old" && { [ "$name" != "${name%%.*}" ] || echo "pruned environment $name"; } ;;
        esac
    done
    [ "$runtime" = docker ] || return 0
    word_of "$root/deployed" image
    # Only images that we named, by 16 digits. Docker itself refuses to remove one that a container still uses.
    docker image ls --format '{{.Repository}}:{{.Tag}}' rlhf-box 2>/dev/null | grep -x 'rlhf-box:[0-9a-f]\{16\}' | grep -v -x -F "$value" | while read -r old; do
        ! docker image rm "$old" >/dev/null 2>&1 || echo "pruned image $old"
    done
}

verb=$1
shift
case $verb in look | lock | land | settle | unlock) "$verb" "$@" ;; *) refuse "no verb $verb" "see remote/on_box/land.sh" ;; esac
