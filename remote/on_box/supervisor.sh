#!/bin/sh
# Supervises the one job of a box, in both runtimes: log, exit code, heartbeat, cancel. The job is a child of this script, which has left
# its own parent. Its state is in files of ROOT/runs/RUN/job. Its verbs, answers and exit codes: PROTOCOL.md.
#
# A request runs at most once: ROOT/requests/REQUEST is made either by `start`, as its last step before the job begins, or by `withdraw`.
# The slot is made before that. A process is identified by its number, its start time, the boot and the namespace of its number, since
# numbers are reused. Several boxes may share ROOT: of a job that another one runs, only the heartbeat is known here, and nothing is written.
#
# shellcheck disable=SC2015 # `a && b || c` is meant as it stands: c also if b fails
# shellcheck disable=SC2016 # the backticks are part of the message
# shellcheck disable=SC2154,SC2034 # j_*, d_* and secret_* are set by eval, `secrets` is read by env/secrets.sh
# shellcheck disable=SC2030,SC2031 # NCCL_P2P_DISABLE is set in two processes

LC_ALL=C
case $PATH in
    *:/usr/lib/wsl/lib) ;;
    *) PATH="${PATH:-/usr/bin:/bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/nvidia/bin:/usr/lib/wsl/lib" ;;
esac
export LC_ALL PATH
umask 022
# shellcheck source=remote/on_box/lib.sh
. "$(dirname -- "$0")/lib.sh"

CHUNK=262144 # bytes of a frame: between two frames there is time for a beat
LEFTOVERS=20 # tenths of a second for processes that a job left behind

# --- small things --------------------------------------------------------------------------------------------------

fail() { # CODE WHAT
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

epoch() { date +%s; }

pause() { sleep "0.$1" 2>/dev/null || sleep 1; } # TENTHS

read_word() { # FILE   sets value: what can be part of an answer, or nothing
    read_line "$1"
    case $value in *[!A-Za-z0-9._,:-]*) value='' ;; esac
}

write() { # FILE TEXT
    { printf '%s\n' "$2" >"$1" && [ -s "$1" ]; } 2>/dev/null
}

put() { # FILE TEXT   by rename, so as a whole or not at all
    write "$1.$$" "$2" && mv -f "$1.$$" "$1" 2>/dev/null && return 0
    rm -f "$1.$$"
    return 1
}

is_name() { # as jobs/spec.py has it
    case $1 in '' | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) return 1 ;; esac
    [ ${#1} -le 64 ]
}

each_tenth() { # TIMES COMMAND...   until it succeeds
    times=$1
    shift
    until "$@"; do
        [ "$times" -gt 0 ] || return 1
        times=$((times - 1))
        pause 1
    done
}

# --- what there is of a job -----------------------------------------------------------------------------------------

members() { # REQUEST   the processes of its job, also in containers; ranks have sessions of their own
    [ -n "$1" ] || return 0
    with_variable "RLHF_REQUEST=$1" | while IFS=/ read -r _ _ pid _; do
        ! is_alive "$pid" || printf '%s\n' "$pid"
    done
}

with_variable() { # NAME=VALUE   /proc/PID/environ of each process that has it
    if printf 'a\000b\000' | grep -qzxF b 2>/dev/null; then
        grep -lszxF -e "$1" /proc/[0-9]*/environ 2>/dev/null
        return
    fi
    for environ in /proc/[0-9]*/environ; do # slower; a grep without -z sees the first variable alone (busybox)
        { tr '\000' '\n' <"$environ"; } 2>/dev/null | grep -qxF -e "$1" && printf '%s\n' "$environ"
    done
}

has_no_members() { [ -z "$(members "$1")" ]; }

is_gone() { ! is_running "$@"; }

end_members() { # REQUEST
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do # the next round finds processes that were started meanwhile
        left=$(members "$1")
        [ -n "$left" ] || return 0
        # shellcheck disable=SC2086
        kill -KILL $left 2>/dev/null
        pause 2
    done
    return 1
}

container_runs() { # REQUEST
    [ "$(docker inspect --format '{{.State.Running}}' "rlhf-box-$1" 2>/dev/null)" = true ]
}

job_is_there() { # of the files that `look` has read
    if [ -n "$j_container" ]; then
        container_runs "$j_request"
    else
        [ $where = here ] && { is_running "${j_process% *}" "${j_process#* }" || ! has_no_members "$j_request"; }
    fi
}

look() { # RUN [kept]   sets j_*, where, their_host, alive, training, words. kept: without a supervisor, keep `training`, since finding it out is slow
    j=$root/runs/$1/job
    for name in request pid start started heartbeat exit ended grace steps container; do
        read_word "$j/$name"
        eval "j_$name=\$value"
    done
    read_line "$j/process"
    j_process=$value alive=0 cancelled=0
    [ ! -e "$j/cancelled" ] || cancelled=1
    read_line "$j/boot"
    sight "$value"
    if [ $where = here ]; then
        ! is_running "$j_pid" "$j_start" || alive=1
    elif [ -n "$j_request" ] && [ -z "$j_exit" ] && read_line "$slot/request" && [ "$value" = "$j_request" ]; then # only this one can live
        ! hears "$j/heartbeat" || alive=1
    fi
    if [ -n "$j_exit" ] || [ -z "$j_request" ]; then
        training=0
    elif [ $alive -eq 1 ]; then
        training=0
        [ -z "$j_process$j_container" ] || training=1
    elif [ "${2-}" != kept ]; then
        training=0
        ! job_is_there || training=1
    fi
    words="run=$1 request=$j_request alive=$alive training=$training cancelled=$cancelled"
    [ $where = here ] || [ -z "$their_host" ] || words="$words host=$their_host"
    for name in exit started ended grace steps; do
        eval "value=\$j_$name"
        [ -z "$value" ] || words="$words $name=$value"
    done
}

tidy() { # REQUEST   of a job without any process left
    is_name "$1" || return 0
    rm -rf "$root/secrets/$1"
    read_line "$slot/request"
    [ "$value" = "$1" ] || return 0
    remove_slot
}

remove_slot() { # by rename, so that nobody sees half a slot
    mv "$slot" "$slot.gone.$$.$host" 2>/dev/null && rm -rf "$slot.gone.$$.$host"
}

tidy_lost() { # a job that `look` has found ended, without a supervisor; one of another host is not touched
    [ $where = away ] || [ "$alive$training" != 00 ] || [ -z "$j_request" ] || [ ! -d "$root/secrets/$j_request" ] || tidy "$j_request"
}

# --- start ----------------------------------------------------------------------------------------------------------

start() { # with the arguments of `run`. The connection may break at any time, so a process that has left it does all work
    has setsid || {
        printf 'refused there is no setsid here (util-linux)\n'
        return
    }
    case $0 in /*) self=$0 ;; *) self=$PWD/$0 ;; esac
    exec 3<&0
    answer=$(setsid sh "$self" run "$@" <&3 3<&- 2>/dev/null &)
    printf '%s\n' "${answer:-refused the supervisor ended without a word}"
}

answer() { # WORD...   to the caller of `start`, who may be gone
    trap '' PIPE
    printf '%s\n' "$*" 2>/dev/null
    trap - PIPE
    exec >/dev/null
}

give_up() { # ANSWER...
    rm -rf "$incoming" "$new"
    if [ -n "$claimed" ]; then
        tidy "$request"
        rmdir "$root/runs/$run/job" "$root/runs/$run" 2>/dev/null # if this call has made them
    fi
    answer "$@"
    exit 0
}

refuse() { give_up refused "$(printf %s "$1" | tr '\n' ' ')"; }

no_room() { refuse "cannot write in $root: $(free_kb "$root") KB are free there"; }

receive() { # read standard input to its end; secrets stay in variables until it is known to be whole
    torn='the connection broke before all of the job was here'
    IFS=' ' read -r word count rest || refuse "$torn"
    [ "$word" = secrets ] && is_number "$count" && [ -z "$rest" ] || refuse 'the input is not a job: it must begin with `secrets N`'
    index=0
    while [ $index -lt "$count" ]; do
        IFS= read -r line || refuse "$torn"
        case ${line%%=*} in '' | [!A-Z]* | *[!A-Z0-9_]*) refuse "secret $((index + 1)) does not name a variable" ;; esac
        case $line in *=*) ;; *) refuse "secret $((index + 1)) has no value" ;; esac
        eval "secret_$index=\$line"
        index=$((index + 1))
    done
    IFS=' ' read -r word hash rest || refuse "$torn"
    case $word$rest in job) ;; *) refuse 'the input is not a job: `job HASH` must follow the secrets' ;; esac
    case $hash in *[!0-9a-f]*) hash='' ;; esac
    [ ${#hash} -ge 16 ] || refuse 'the hash of the job file is not one'
    mkdir -p "$root/inputs" 2>/dev/null && { cat >"$incoming"; } 2>/dev/null || no_room
    sum=$(sha256sum <"$incoming")
    case $sum in "$hash"*) ;; *) refuse "$torn" ;; esac
}

read_deployed() { # FILE   sets d_*
    d_code='' d_runtime='' d_environment='' d_python='' d_image='' d_route='' d_mirror='' d_flavour='' d_p2p='' d_env_files='' d_proxy_files=''
    while read -r key value; do
        case $key in
            code | runtime | environment | python | image | route | mirror | flavour | p2p) eval "d_$key=\$value" ;;
            env_file) d_env_files="$d_env_files$value$newline" ;;
            proxy_file) d_proxy_files="$d_proxy_files$value$newline" ;;
        esac
    done <"$1"
    d_image=${d_image#rlhf-box:}
    is_name "$d_mirror" && [ "$d_route" = mirror ] || d_mirror=default # never through both a mirror and a proxy
}
newline='
'

check() { # whether the job can begin at all
    [ -f "$root/.rlhf-box" ] && [ -r "$root/deployed" ] || refuse "nothing is deployed in $root"
    read_deployed "$root/deployed"
    [ "$d_code" = "$fp" ] && [ -d "$code" ] || refuse "the code $fp is not deployed here; deployed: ${d_code:-none}"
    [ -r "$code/env/mirrors/$d_mirror.env" ] || refuse "there is no mirror $d_mirror in env/mirrors"
    case $d_runtime in
        bare) [ -x "$d_python" ] || refuse "there is no Python at ${d_python:-?}: deploy again" ;;
        docker) docker image inspect "rlhf-box:$d_image" >/dev/null 2>&1 || refuse "the image rlhf-box:$d_image is not here, or Docker does not answer: deploy again" ;;
        *) refuse "the runtime ${d_runtime:-of this box} is not known: deploy again" ;;
    esac
}

was_decided() { [ -e "$root/requests/$1/started" ] || [ -e "$root/requests/$1/withdrawn" ]; }

say_decided() {
    each_tenth 10 was_decided "$request"
    [ ! -e "$root/requests/$request/withdrawn" ] || give_up withdrawn "$request"
    give_up already "$request"
}

claim() { # take the slot, or say who has it
    waits=20
    until mkdir "$slot" 2>/dev/null; do
        [ -d "$slot" ] || no_room
        read_word "$slot/run" && has_slot=$value && read_word "$slot/request" && had=$value && read_word "$slot/start"
        if [ -z "$value" ] || ! is_name "$has_slot"; then # it is being made, or released
            [ $waits -gt 0 ] || take_over "$had"
        else
            look "$has_slot"
            if [ "$j_request" != "$had" ]; then # it was claimed, and its job has not begun yet
                j_exit='' alive=0 training=0
                read_line "$slot/boot"
                sight "$value"
                if [ $where = here ]; then
                    read_word "$slot/start" && begun=$value && read_word "$slot/pid" && is_running "$value" "$begun" && alive=1
                elif read_word "$slot/claimed" && is_number "$value"; then # there is no heartbeat yet
                    age=$(($(epoch) - value))
                    [ ${age#-} -gt $QUIET_S ] || alive=1
                fi
            fi
            if [ "$alive$training" = 00 ]; then
                take_over "$had"
            elif [ -z "$j_exit" ] || [ $waits -eq 0 ]; then
                [ "$had" != "$request" ] || say_decided
                [ $where = here ] || give_up busy "$has_slot" "$had" "$their_host"
                give_up busy "$has_slot" "$had"
            fi
        fi
        waits=$((waits - 1))
        [ $waits -gt -30 ] || refuse "another start is taking over the slot of run ${has_slot:-?}, and does not end"
        pause 1
    done
    claimed=1
    # `start` last: with it, the slot is whole.
    write "$slot/run" "$run" && write "$slot/request" "$request" && write "$slot/code" "$fp" && write "$slot/environment" "$d_environment" &&
        write "$slot/pid" $$ && write "$slot/claimed" "$(epoch)" && write "$slot/boot" "$boot $namespace $host" && cp "$root/deployed" "$slot/deployed" 2>/dev/null && write "$slot/start" "$own_start" || no_room
}

take_over() { # REQUEST   the slot of a job that is gone. Two calls may do this concurrently, and one may see the other's new slot
    if ! mkdir "$slot/taken" 2>/dev/null; then
        read_line "$slot/taken/by"
        [ -z "$value" ] || taker_lives || rm -rf "$slot/taken"
        return 0
    fi
    printf '%s\n' "$$ $own_start $(epoch) $boot $namespace $host" 2>/dev/null >"$slot/taken/by"
    read_word "$slot/request"
    if [ "$value" = "$1" ]; then
        remove_slot
        ! is_name "$1" || [ "$1" = "$request" ] || rm -rf "$root/secrets/$1"
    else
        rm -rf "$slot/taken"
    fi
}

taker_lives() { # of the line in value: PID START [EPOCH BOOT NAMESPACE HOST]
    set -f
    # shellcheck disable=SC2086
    set -- $value
    set +f
    if [ $# -le 2 ] || { sight "$4 $5 ${6-}" && [ $where = here ]; }; then
        is_running "$1" "${2-}"
    else # taking over is done in a moment
        is_number "$3" && age=$(($(epoch) - $3)) && [ "${age#-}" -le $QUIET_S ]
    fi
}

own() { # FILE...   that the container's user shall read or write
    [ "$uid" = "$(id -u)" ] || chown -R "$uid:$gid" "$@"
}

keep_job() { # in inputs, with the folders that training writes to
    mkdir -p "$root/runs" "$root/cache/huggingface" "$root/cache/rlhf-box" "$root/cache/tmp" "$root/inputs/$hash" 2>/dev/null &&
        mv -f "$incoming" "$root/inputs/$hash/job.yaml" || no_room
    incoming=''
}

for_user() { # sets uid, gid: of the process that trains, which in a container is never root; it may then write where it must
    uid=$(id -u) gid=$(id -g)
    [ "$d_runtime" = docker ] || return 0
    [ "$uid" != 0 ] || { uid=1000 gid=1000; }
    own "$root/inputs/$hash" || no_room
    [ "$uid" = "$(id -u)" ] || chown "$uid:$gid" "$root/runs" "$root/cache" "$root/cache/huggingface" "$root/cache/rlhf-box" "$root/cache/tmp"
}

prepare() { # write all that needs room on the disk, so that nothing can fail after it
    keep_job
    mkdir -p "$root/requests" "$root/runs/$run/job" 2>/dev/null && (umask 077 && mkdir -p "$root/secrets/$request") 2>/dev/null || no_room
    for folder in "$root"/secrets/*; do [ "${folder##*/}" = "$request" ] || rm -rf "$folder"; done # of jobs whose end was not seen
    index=0
    while [ $index -lt "$count" ]; do
        eval "line=\$secret_$index secret_$index=''"
        (umask 077 && write "$root/secrets/$request/${line%%=*}" "${line#*=}") || no_room
        index=$((index + 1))
    done
    line=''
    rm -rf "$new"
    now=$(epoch)
    mkdir "$new" 2>/dev/null && write "$new/request" "$request" && write "$new/pid" $$ && write "$new/start" "$own_start" && write "$new/boot" "$boot $namespace $host" &&
        write "$new/started" "$now" && write "$new/heartbeat" "$now" && write "$new/grace" "$grace" && write "$new/steps" "$steps" || no_room
    # A reserve, which is released before the exit code is written: a full disk must not lose the code.
    { head -c 16384 /dev/zero >"$new/room" && printf '' >"$new/output"; } 2>/dev/null && [ "$(wc -c <"$new/room")" -eq 16384 ] || no_room
    for_user
    if [ "$d_runtime" = docker ]; then
        own "$root/secrets/$request" || no_room
        [ "$uid" = "$(id -u)" ] || chown "$uid:$gid" "$root/runs/$run" "$root/runs/$run/job"
    fi
}

steps_in() { # ARG...   sets steps: those that are asked for, by rlhf-train's rules
    steps='' taking=''
    for word; do
        case $word in
            --step) taking=1 steps='' ;;
            --step=*) taking='' steps=${word#*=} ;;
            -*) taking='' ;;
            *) [ -z "$taking" ] || steps="$steps,$word" ;;
        esac
    done
    case ,$steps, in *[!0-9,]* | ,,) steps=1,2,3 ;; esac
    steps=${steps#,}
}

run() { # RUN REQUEST FP GRACE_S -- ARG...   the supervisor
    incoming='' new='' claimed=''
    [ $# -ge 5 ] && [ "$5" = -- ] || refuse 'the call is `start ROOT RUN REQUEST FP GRACE_S -- ARG...`'
    run=$1 request=$2 fp=$3 grace=$4
    shift 5
    is_name "$run" || refuse 'this cannot name a run: letters, digits, dots, dashes and underscores, 64 at most'
    is_name "$request" || refuse 'this cannot name a request'
    is_name "$fp" && is_number "$grace" || refuse 'the code or the grace is not valid'
    case $root in /*) ;; *) refuse 'ROOT must be an absolute path' ;; esac
    [ -d "$root/code" ] || refuse "nothing is deployed in $root"
    code=$root/code/$fp incoming=$root/inputs/.incoming.$request.$$ new=$root/runs/$run/job/new.$$
    fields_of $$ || refuse 'cannot read /proc'
    own_start=$since
    steps_in "$@"
    receive
    check
    [ ! -d "$root/requests/$request" ] || say_decided
    claim
    prepare
    if ! mkdir "$root/requests/$request" 2>/dev/null; then
        [ -d "$root/requests/$request" ] || no_room
        rm -rf "$root/secrets/$request"
        say_decided
    fi
    { printf '' >"$root/requests/$request/started"; } 2>/dev/null

    job=$root/runs/$run/job
    (cd "$job" && rm -f process container exit ended cancelled gpu) # of an earlier call
    mv -f "$new"/[!r]* "$new/room" "$job"
    mv -f "$new/request" "$job" # last: from here on all files are this job's
    rmdir "$new"
    answer started "$request" $$
    exec </dev/null >>"$job/output" 2>&1
    caught=0 target=''
    trap 'caught=1; end_softly' TERM INT HUP # a box that is shut down
    pulse &
    pulse=$!
    code_of_job=127
    "run_$d_runtime" "$@"
    finish
}

end_softly() {
    [ -z "$target" ] || kill -TERM "$target" 2>/dev/null
    [ ! -e "$job/container" ] || docker kill -s TERM "rlhf-box-$request" >/dev/null 2>&1
}

wait_for() { # PID   sets code_of_job; a signal for us ends `wait`, and not the job
    while :; do
        caught=0
        wait "$1"
        code=$?
        [ $code -ne 127 ] || [ "$code_of_job" -eq 127 ] || return 0 # its code was reported the time before
        code_of_job=$code
        [ $caught -eq 1 ] && [ $code -gt 128 ] || return 0
    done
}

cleanly() { # [NAME=VALUE...] COMMAND...   becomes the command, in a clean environment and a session of its own
    exec setsid env -i PATH="$PATH" HOME="${HOME:-$root/cache}" USER="${USER:-$(id -un)}" LOGNAME="${USER:-$(id -un)}" LANG=C.UTF-8 "$@"
}

run_bare() { # ARG...
    cleanly RLHF_REQUEST="$request" sh "$code/remote/on_box/supervisor.sh" job "$root" "$run" "$request" "$hash" "$@" </dev/null &
    target=$!
    ! fields_of "$target" || put "$job/process" "$target $since"
    [ ! -e "$job/cancelled" ] || kill -TERM "$target" 2>/dev/null
    wait_for "$target"
    each_tenth $LEFTOVERS has_no_members "$request" || {
        printf 'supervisor: the job ended with %s and left processes, which are ended now\n' "$code_of_job"
        end_members "$request"
    }
}

run_docker() { # ARG...
    name=rlhf-box-$request
    put "$job/container" "$name"
    if start_container "$@" </dev/null; then
        [ ! -e "$job/cancelled" ] || docker kill -s TERM "$name" >/dev/null 2>&1
        docker logs -f "$name" </dev/null &
        logs=$!
        watch_container &
        wait_for $!
        fields_of "$logs" && logs_start=$since && each_tenth 50 is_gone "$logs" "$logs_start"
        kill "$logs" 2>/dev/null
        [ ! -e "$root/requests/$request/vanished" ] || code_of_job=''
    else
        code_of_job=3
    fi
    docker rm -f "$name" >/dev/null 2>&1
}

watch_container() { # ends with the container's code. The daemon may be away for a while; the container may have been removed
    trap - TERM INT HUP
    misses=0
    while [ $misses -lt 3 ]; do
        said=$(docker wait "$name" </dev/null 2>/dev/null)
        ! is_number "$said" || exit "$said"
        said=$(docker inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$name" 2>/dev/null)
        case $said in
            'exited '* | 'dead '*) exit "${said#* }" ;;
            ?*) misses=0 ;;
            *) ! docker version >/dev/null 2>&1 || misses=$((misses + 1)) ;;
        esac
        sleep 1
    done
    printf '' >"$root/requests/$request/vanished" # not in the slot, which another host may have by now
    exit 1
}

start_container() ( # ARG...
    look_for_gpu
    RLHF_SECRETS=$root/secrets/$request RLHF_REQUEST=$request RLHF_GRACE=$grace
    export RLHF_SECRETS RLHF_REQUEST RLHF_GRACE
    # Not in the foreground: a signal to that client would lose the container (reference: Compose 2.26).
    compose_run -d -T --no-deps --name "$name" train --job "$root/inputs/$hash/job.yaml" --run "$run" "$@" >/dev/null && exit 0
    docker rm -f "$name" >/dev/null 2>&1
    exit 1
)

look_for_gpu() { # sets cpu where this box has none
    [ -e /proc/driver/nvidia/version ] || [ -e /dev/dxg ] || has nvidia-smi || cpu=1
}

compose_run() { # WORD...   `docker compose run`, without a GPU if `cpu` is set; in a subshell, whose environment it changes
    RLHF_TAG=$d_image RLHF_UID=$uid RLHF_GID=$gid RLHF_RUNS=$root/runs RLHF_CACHE=$root/cache RLHF_INPUTS=$root/inputs MIRROR=$d_mirror
    export RLHF_TAG RLHF_UID RLHF_GID RLHF_RUNS RLHF_CACHE RLHF_INPUTS MIRROR
    unset HF_ENDPOINT COMPOSE_FILE COMPOSE_PROFILES
    the_proxy
    [ "$d_p2p" != 1 ] || export NCCL_P2P_DISABLE=1
    code=$root/code/$fp
    docker compose --project-directory "$code" --env-file /dev/null -f "$code/docker-compose.yml" ${cpu:+-f "$code/docker/compose.cpu.yml"} \
        -f "$code/docker/compose.box.yml" run "$@"
}

the_proxy() { # of this environment, or of the first file that sets one; none at all on another route
    if [ "$d_route" != proxy ]; then
        unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
        return 0
    fi
    while IFS= read -r file; do
        [ -z "${https_proxy:-}${HTTPS_PROXY:-}${all_proxy:-}${ALL_PROXY:-}" ] || break
        source_file "$file"
    done <<END
$d_proxy_files
END
    export http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY
    for name in http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY; do
        eval "[ -n \"\${$name:-}\" ]" || unset $name
    done
}

source_file() { # FILE   of the provider; a file that would end this shell is left out
    # shellcheck disable=SC1090
    [ -r "$1" ] && (. "$1") >/dev/null 2>&1 </dev/null && . "$1" >/dev/null 2>&1 </dev/null
}

training_environment() { # DEPLOYED   of the training package: variables of the provider, the proxy, mirror and caches
    read_deployed "$1"
    code=$root/code/$d_code cache=$root/cache
    while IFS= read -r file; do
        set -a
        source_file "$file"
        set +a
    done <<END
$d_env_files
END
    the_proxy
    unset HF_ENDPOINT
    set -a
    # shellcheck disable=SC1090
    . "$code/env/mirrors/$d_mirror.env"
    set +a
    # PYTHONDONTWRITEBYTECODE: the folder of the code stays as it was sent; compiling it each time takes 0.1 s. PYTHONPYCACHEPREFIX would
    # also hide what pip has compiled: PyTorch and transformers then cost each process 8 s more at a box's first start.
    PATH=${d_python%/*}:$PATH PYTHONPATH=$code PYTHONUNBUFFERED=1 RLHF_RUNS=$root/runs PYTHONDONTWRITEBYTECODE=1 RLHF_FLAVOUR=$d_flavour
    export PATH PYTHONPATH PYTHONUNBUFFERED RLHF_RUNS PYTHONDONTWRITEBYTECODE RLHF_FLAVOUR
    # shellcheck source=env/caches.sh
    . "$code/env/caches.sh"
    [ "$d_p2p" != 1 ] || export NCCL_P2P_DISABLE=1
    unset LC_ALL
}

train_here() { # ARG...   becomes the training package
    # shellcheck source=env/cuda.sh
    . "$code/env/cuda.sh"
    # shellcheck disable=SC3045 # where a shell has it
    ulimit -n "$(ulimit -H -n)" 2>/dev/null
    cd "$code" || exit 3
    exec "$d_python" -m rlhf_train "$@"
}

job() { # RUN REQUEST HASH ARG...   in a clean environment; becomes the training process
    run=$1 request=$2 hash=$3
    shift 3
    refuse() {
        printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
        exit 3
    }
    training_environment "$slot/deployed"
    secrets=$root/secrets/$request
    # shellcheck source=env/secrets.sh
    . "$code/env/secrets.sh"
    train_here --job "$root/inputs/$hash/job.yaml" --run "$run" "$@"
}

chat() { # ARG...   of `rlhf-train chat`; becomes it, on this terminal, if there is one. No secrets: those of a run go with it
    [ -r "$root/deployed" ] || fail 3 "nothing is deployed in $root"
    read_deployed "$root/deployed"
    if [ "$d_runtime" != docker ]; then
        refuse() { fail 3 "$1; $2"; }
        training_environment "$root/deployed"
        train_here chat "$@"
    fi
    none=$root/secrets/none
    (umask 077 && mkdir -p "$none") 2>/dev/null
    fp=$d_code uid=$(id -u) gid=$(id -g)
    [ "$uid" != 0 ] || { uid=1000 gid=1000; }
    own "$none"
    look_for_gpu
    export RLHF_SECRETS="$none" RLHF_REQUEST='' RLHF_GRACE=10
    [ -t 0 ] && [ -t 1 ] && piped='' || piped=1
    compose_run --rm --no-deps ${piped:+-T} --name "rlhf-box-chat-$$" train chat "$@"
}

ask_cards() { # FILE QUERY   in the background, since nvidia-smi may hang for ever; sets smi, smi_start. The file is whole once it is there.
    limit=''
    ! has timeout || limit='timeout 10'
    { { $limit nvidia-smi "$2" --format=csv,noheader,nounits </dev/null >"$1.$$" && mv -f "$1.$$" "$1" || rm -f "$1.$$"; }; } >/dev/null 2>&1 &
    smi=$!
    smi_start=''
    ! fields_of $smi || smi_start=$since
}

USE=--query-gpu=index,memory.used,memory.total,utilization.gpu

is_displaced() { # another host took this run over while this one was silent: the records are its own now
    read_line "$job/request" && [ "$value" != "$request" ]
}

pulse() { # until the supervisor is gone
    trap - TERM INT HUP
    second=0 smi='' smi_start=''
    while is_running $$ "$own_start" && ! is_displaced; do
        { printf '%s\n' "$(epoch)" 1<>"$job/heartbeat"; } 2>/dev/null # in its place, which needs no room: a full disk must not silence us
        if [ $((second % 5)) -eq 0 ] && has nvidia-smi; then # one at a time, even if it hangs
            is_running "$smi" "$smi_start" || ask_cards "$job/gpu" $USE
        fi
        second=$((second + 1))
        sleep 1
    done
}

finish() {
    kill "$pulse" 2>/dev/null
    is_displaced || rm -f "$job/room" "$job/gpu" "$job"/*.$$
    until is_displaced || { put "$job/ended" "$(epoch)" && { [ -z "$code_of_job" ] || put "$job/exit" "$code_of_job"; }; }; do sleep 1; done
    tidy "$request"
    exit 0
}

# --- download -------------------------------------------------------------------------------------------------------

# Fetches what a job needs into the caches, as long as the caller hears it. It is no run and takes no slot: a job may run next to it.
# The secrets go through a pipe from one shell to the next, so that they are in no file and no argument.
download() { # REQUEST FP -- ARG...
    incoming='' new='' claimed='' child='' status=0
    [ $# -ge 3 ] && [ "$3" = -- ] || refuse 'the call is `download ROOT REQUEST FP -- ARG...`'
    request=$1 fp=$2
    shift 3
    is_name "$request" && is_name "$fp" || refuse 'this cannot name a request, or the code'
    [ -d "$root/code" ] || refuse "nothing is deployed in $root"
    code=$root/code/$fp incoming=$root/inputs/.incoming.$request.$$ name=rlhf-box-download-$request
    receive
    check
    keep_job
    for_user
    trap end_download PIPE TERM HUP INT
    printf 'begun\n' || end_download
    if [ "$d_runtime" = docker ]; then
        secret_lines | (download_in_container "$@") &
    else
        secret_lines | cleanly sh "$code/remote/on_box/supervisor.sh" fetcher "$root" "$hash" "$@" &
    fi
    child=$!
    tenth=0
    while is_alive $child; do
        pause 2
        tenth=$((tenth + 2))
        [ $((tenth % 10)) -ne 0 ] || printf 'beat\n' || end_download
    done
    wait $child || status=$?
    [ "$d_runtime" != docker ] || docker rm -f "$name" >/dev/null 2>&1
    printf 'ended %s\n' $status
}

end_download() { # with the caller, or when we are told to
    trap '' PIPE TERM HUP INT
    [ -z "$child" ] || kill -TERM "-$child" 2>/dev/null || kill -TERM "$child" 2>/dev/null
    [ "$d_runtime" != docker ] || docker rm -f "$name" >/dev/null 2>&1
    exit 143
}

secret_lines() {
    index=0
    while [ $index -lt "$count" ]; do
        eval "printf '%s\\n' \"\$secret_$index\""
        index=$((index + 1))
    done
}

READS_SECRETS='while IFS= read -r line; do export "$line"; done'

fetcher() { # HASH ARG...   in a clean environment, with the secrets as standard input; becomes the training package, which fetches
    hash=$1
    shift
    training_environment "$root/deployed"
    unset PYTHONUNBUFFERED # each line in one piece, next to our beats
    eval "$READS_SECRETS"
    train_here --download --job "$root/inputs/$hash/job.yaml" "$@" </dev/null 2>&1
}

download_in_container() { # ARG...
    unset RLHF_REQUEST RLHF_SECRETS
    cpu=1
    compose_run --rm -T --no-deps --name "$name" --entrypoint sh train -c "$READS_SECRETS"'; exec /opt/entrypoint python -m rlhf_train "$@" </dev/null 2>&1' \
        rlhf-box --download --job "$root/inputs/$hash/job.yaml" "$@"
}

# --- withdraw -------------------------------------------------------------------------------------------------------

withdraw() { # REQUEST
    is_name "$1" || fail 2 'this cannot name a request'
    mkdir -p "$root/requests" 2>/dev/null
    if mkdir "$root/requests/$1" 2>/dev/null; then
        { printf '' >"$root/requests/$1/withdrawn"; } 2>/dev/null
    elif [ ! -d "$root/requests/$1" ]; then
        fail 6 "cannot write in $root/requests: whether it was started cannot be said"
    else
        each_tenth 10 was_decided "$1"
        [ -e "$root/requests/$1/withdrawn" ] || {
            printf 'started %s\n' "$1"
            return
        }
    fi
    printf 'not_run %s\n' "$1"
}

# --- follow and list ------------------------------------------------------------------------------------------------

size_of() { # FILE   sets size; 0 where it is not
    size=$(stat -L -c %s "$1" 2>/dev/null) || size=$({ wc -c <"$1"; } 2>/dev/null) || size=0
    size=$((${size:-0}))
}

send() { # FILE   send what it has beyond offset. A short frame (the file was cut just then) cannot be mended, so the connection ends.
    size_of "$1"
    if [ "$size" -lt "$offset" ]; then
        offset=$size
        printf 'shrunk %s\n' "$size" || exit 0
    fi
    while [ "$offset" -lt "$size" ]; do
        length=$((size - offset))
        [ $length -le $CHUNK ] || length=$CHUNK
        printf 'bytes %s %s\n' "$offset" $length || exit 0
        # `wc` counts the bytes. Standard output may be a socket, which cannot be opened a second time; the pipe to wc can.
        sent=$({ tail -c "+$((offset + 1))" "$1" 2>/dev/null | head -c $length | tee /proc/self/fd/4 >&3; } 4>&1 | wc -c)
        [ $((sent)) -eq $length ] || exit 1
        offset=$((offset + length))
    done
}

beat() { # each second, and only when all that was there is sent, since it says so
    now=$(epoch)
    [ "$now" != "$beaten" ] || return 0
    cards=''
    { read_cards <"$j/gpu"; } 2>/dev/null
    [ "$cards" = "$told_cards" ] || printf %s "$cards" || exit 0
    told_cards=$cards beaten=$now
    printf 'beat %s\n' "$now" || exit 0
}

read_cards() { # lines of nvidia-smi -> adds to cards
    while IFS=, read -r index used total busy; do
        is_number "$index" && cards="${cards}gpu $index $(first_word "$used") $(first_word "$total") $(first_word "$busy")$newline"
    done
}

first_word() { # TEXT   -, where it is not a number
    set -f
    # shellcheck disable=SC2086
    set -- $1
    set +f
    is_number "${1-}" && printf %s "$1" || printf -
}

lines_from_end() { # FILE LINES   sets offset: where its last LINES lines begin
    for _ in 1 2 3 4 5; do # again, if the file grew meanwhile
        size_of "$1"
        offset=$((size - $(tail -n "$2" "$1" 2>/dev/null | wc -c)))
        length=$size
        size_of "$1"
        [ "$size" -ne "$length" ] || break
    done
    [ "$offset" -ge 0 ] || offset=0
}

follow() { # RUN FILE OFFSET|-LINES
    is_name "$1" || fail 2 'this cannot name a run'
    [ -d "$root/runs/$1" ] || fail 2 "there is no run $1 in $root/runs"
    is_number "${3#-}" || fail 2 'the offset is not a number'
    offset=$3 told='' told_cards='' beaten='' tick=0 quiet=0 training=0 kept=''
    case $2 in
        events) file=$root/runs/$1/events.jsonl ;;
        log) file=$root/runs/$1/train.log ;;
        output) file=$root/runs/$1/job/output ;;
        *) fail 2 'events, log or output can be followed' ;;
    esac
    case $3 in
        -*)
            lines_from_end "$file" "${3#-}"
            printf 'from %s\n' "$offset" || exit 0
            ;;
    esac
    exec 3>&1
    while :; do
        look "$1" $kept
        if [ "$words" != "$told" ]; then
            told=$words
            printf 'job %s%s\n' "$words" "${j_heartbeat:+ heartbeat=$j_heartbeat}" || exit 0
        fi
        send "$file"
        beat
        if [ "$alive$training" = 00 ] || [ -n "$j_exit" ]; then
            quiet=$((quiet + 1))
            # Without an exit code a second look decides: the run may be about to start again.
            if [ -n "$j_exit" ] || [ $quiet -gt 2 ]; then
                printf 'done\n' || exit 0
                tidy_lost
                exit 0
            fi
        else
            quiet=0
        fi
        tick=$((tick + 1)) kept=kept
        [ $((tick % 5)) -ne 0 ] && [ $quiet -eq 0 ] || kept=''
        pause 2
    done
}

list() {
    for folder in "$root"/runs/*/; do
        name_of_run=${folder%/}
        name_of_run=${name_of_run##*/}
        is_name "$name_of_run" || continue
        look "$name_of_run"
        complete='' checkpoints=''
        for step in 1 2 3; do
            [ ! -e "${folder}step$step/complete.json" ] || complete="$complete,$step"
            for saved in "${folder}step$step"/checkpoints/update-*/complete.json; do
                update=${saved%/complete.json}
                update=${update##*/update-}
                ! is_number "$update" || [ ! -e "$saved" ] || checkpoints="$checkpoints,$step:$update"
            done
        done
        size_kb=$(du -sk "$folder" 2>/dev/null)
        printf 'run %s %s%s size_kb=%s%s%s\n' "$name_of_run" "$words" "${j_heartbeat:+ heartbeat=$j_heartbeat}" "${size_kb%%[!0-9]*}" \
            "${complete:+ complete=${complete#,}}" "${checkpoints:+ checkpoint=${checkpoints#,}}"
        last=''
        # The second of two lines may be torn, and is then not read.
        last=$(tail -n 2 "${folder}events.jsonl" 2>/dev/null | { while IFS= read -r line; do last=$line; done && printf %s "$last"; })
        [ -z "$last" ] || printf 'last %s %s\n' "$name_of_run" "$last"
        tidy_lost
        [ "$alive$training" = 00 ] || [ -n "$j_exit" ] || printf 'slot %s %s\n' "$name_of_run" "$j_request"
    done
    if has nvidia-smi; then
        cards=''
        ask_cards "$root/.smi.$$.$host" $USE
        each_tenth 20 is_gone "$smi" "$smi_start"
        { read_cards <"$root/.smi.$$.$host"; } 2>/dev/null
        printf %s "$cards"
        rm -f "$root/.smi.$$.$host"
    fi
    free=$(free_kb "$root")
    [ -z "$free" ] || printf 'disk %s\n' "$free"
    printf 'beat %s\n' "$(epoch)"
}

# --- cancel ---------------------------------------------------------------------------------------------------------

has_ended() { # RUN   the job that `cancel` has found; another job may have begun since
    look "$1"
    [ -n "$j_exit" ] || [ "$alive$training" = 00 ] || [ "$j_request" != "$wanted" ]
}

term() { # -> whether there was a process to signal
    if [ -n "$j_container" ]; then
        docker kill -s TERM "$j_container" >/dev/null 2>&1
    elif is_running "${j_process% *}" "${j_process#* }"; then
        kill -TERM "${j_process% *}" 2>/dev/null
    elif [ $alive -eq 0 ]; then # the ranks, without their supervisor
        left=$(members "$wanted")
        # shellcheck disable=SC2086
        [ -n "$left" ] && kill -TERM $left 2>/dev/null
    else
        false # the job is about to begin; the supervisor itself then looks for `cancelled`
    fi
}

cancel() { # RUN GRACE_S
    is_name "$1" || fail 2 'this cannot name a run'
    is_number "$2" || fail 2 'the grace is not a number of seconds'
    [ -d "$root/runs/$1" ] || fail 2 "there is no run $1 in $root/runs"
    look "$1"
    wanted=$j_request
    if [ -n "$wanted" ] && [ -z "$j_exit" ] && { [ "$training" -eq 0 ] || [ "$alive" -eq 1 ]; } && [ "$where" != here ]; then
        if [ $alive -eq 1 ]; then # nothing of it is in sight, nor its records are ours to change
            printf 'elsewhere %s\n' "$their_host"
            return
        elif [ $where = away ]; then
            printf 'unheard %s %s\n' "$their_host" "${j_heartbeat:-0}"
            return
        fi
    fi
    if [ -z "$wanted" ] || has_ended "$1"; then
        tidy_lost
        printf 'not_running\n'
        return
    fi
    # Before the signal, since the file tells a cancel from a box that is taken away.
    put "$j/cancelled" "$(epoch)" || { rm -f "$j/room" && put "$j/cancelled" "$(epoch)"; } || fail 6 "cannot write in $j: nothing was cancelled"
    if term; then told=1; else told=''; fi
    printf 'term\n'
    deadline=$(($(epoch) + $2))
    until has_ended "$1"; do
        [ -n "$told" ] || ! term || told=1
        [ "$(epoch)" -lt $deadline ] || break
        pause 2
    done
    if ! has_ended "$1"; then
        printf 'kill\n'
        [ -z "$j_container" ] || docker stop -t 0 "$j_container" >/dev/null 2>&1 || docker kill "$j_container" >/dev/null 2>&1
        end_members "$wanted"
        each_tenth 100 has_ended "$1"
    elif [ $alive -eq 0 ]; then
        end_members "$wanted"
    fi
    [ "$j_request" = "$wanted" ] && said=${j_exit:--} || said=-
    printf 'ended %s\n' "$said"
    if [ $alive -eq 0 ] && [ "$j_request" = "$wanted" ]; then
        [ -z "$j_container" ] || docker rm -f "$j_container" >/dev/null 2>&1
        has_no_members "$wanted" && tidy "$wanted"
    fi
    prove
}

prove() { # that nothing is left; the driver takes a moment to give memory back
    for _ in 1 2 3 4 5 6; do
        found=$(
            members "$wanted" | while read -r pid; do printf 'left %s %s\n' "$pid" "$(command_of "$pid")"; done
            holders
        )
        [ -n "$found" ] || break
        pause 5
    done
    printf '%s\n' "${found:-free}"
}

holders() { # gpu_held UUID PID MIB COMMAND, by the driver (in a container with the host's pids) and by who has a card open
    listed=' '
    if has nvidia-smi; then
        ask_cards "$root/.smi.$$.$host" --query-compute-apps=gpu_uuid,pid,used_memory
        each_tenth 30 is_gone "$smi" "$smi_start" || printf 'gpu_held - - - nvidia-smi does not answer\n'
        while IFS=', ' read -r uuid pid used _; do
            is_number "$pid" || continue
            printf 'gpu_held %s %s %s %s\n' "$uuid" "$pid" "$(first_word "$used")" "$(command_of "$pid")"
            listed="$listed$pid "
        done 2>/dev/null <"$root/.smi.$$.$host"
        rm -f "$root/.smi.$$.$host"
    fi
    [ -e /dev/nvidiactl ] || return 0
    # shellcheck disable=SC2012 # find cannot print what a link says in busybox
    ls -l /proc/[0-9]*/fd 2>/dev/null | sed -n 's|^/proc/\([0-9]*\)/fd:$|\1|p; s|.* -> /dev/nvidia[0-9][0-9]*$|open|p' | while read -r word; do
        [ "$word" = open ] || holder=$word
        [ "$word" = open ] && [ -n "$holder" ] || continue
        said=$(command_of "$holder")
        case $said in *nvidia-persistenced* | *nv-hostengine* | *dcgm*) holder='' ;; esac # these only monitor, and hold no memory
        case $listed in *" $holder "*) ;; *) [ -z "$holder" ] || printf 'gpu_held - %s - %s\n' "$holder" "$said" ;; esac
        holder=''
    done
}

# --------------------------------------------------------------------------------------------------------------------

[ $# -ge 2 ] || fail 2 'the call is `supervisor.sh VERB ROOT ...`'
verb=$1 root=${2%/}
slot=$root/slot
place
case $verb in
    start)
        shift
        start "$@"
        ;;
    run | job | download | fetcher)
        shift 2
        "$verb" "$@"
        ;;
    chat)
        shift 2
        chat "$@"
        ;;
    withdraw)
        [ $# -eq 3 ] || fail 2 'the call is `withdraw ROOT REQUEST`'
        withdraw "$3"
        ;;
    follow)
        [ $# -eq 5 ] || fail 2 'the call is `follow ROOT RUN events|log|output OFFSET|-LINES`'
        follow "$3" "$4" "$5"
        ;;
    list) list ;;
    cancel)
        [ $# -eq 4 ] || fail 2 'the call is `cancel ROOT RUN GRACE_S`'
        cancel "$3" "$4"
        ;;
    *) fail 2 "there is no verb $verb" ;;
esac
