#!/bin/sh
# Finds out what a box is and has, in one call. It prints `key<TAB>value` lines, in no order, for remote/survey/facts.py. Its words and
# answers: PROTOCOL.md.
#
# Slow parts run concurrently in the background, each with its own time limit; all end within 6 s. A part prints its own lines, each in
# one write, so that nothing is written to the disk and a part that hangs blocks no other. It needs no root, no `timeout` and no other
# tool: what is missing is not reported. Fields of a value are separated by `|`; only the last field may hold one itself.

LC_ALL=C PATH="${PATH:-/usr/bin:/bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/nvidia/bin:/usr/lib/wsl/lib"
export LC_ALL PATH
umask 077
# shellcheck source=remote/on_box/lib.sh
. "$(dirname -- "$0")/lib.sh"
cd / || exit 1
trap '' PIPE # if the connection breaks, nobody reads the rest, but the parts are still ended

running=''
under=''

say() { # KEY FIELD...
    key=$1 line=''
    shift
    while [ $# -gt 0 ]; do
        field=$1
        case $field in *[!\ -~]*) field=$(printf %s "$field" | tr '\n\t' '  ' | tr -d '\000-\037\177') ;; esac
        [ $# -eq 1 ] || case $field in *"|"*) field=$(printf %s "$field" | tr '|' ' ') ;; esac
        line="$line|$field"
        shift
    done
    printf '%s\t%s\n' "$key" "${line#|}"
}

each_line() { # KEY FIELD...   a line of standard input, one value
    while IFS= read -r text || [ -n "$text" ]; do say "$@" "$text"; done
}

first_line() { # TEXT
    printf '%s\n' "$1" | sed -n '/[^[:space:]]/{p;q;}'
}

now() { # sets ticks: hundredths of a second since some time
    { read -r uptime rest </proc/uptime; } 2>/dev/null || uptime=0.00
    ticks=$((${uptime%.*} * 100 + 1${uptime#*.} - 100))
}

expand() { # PATH   sets path
    # shellcheck disable=SC2016 # the word itself is meant
    case $1 in
        '$HOME') path=${HOME:-/} ;;
        '$HOME/'*) path=${HOME:-}/${1#*/} ;;
        *) path=$1 ;;
    esac
}

start() { # NAME TICKS COMMAND...   in the background, ended after so many ticks; the name is one word
    entry=$1:$2
    shift 2
    "$@" </dev/null 2>/dev/null &
    running="$running $!:$entry"
}

end_tree() { # PID...   end these and all that they have started; only our own children, whatever the list says
    before=''
    while :; do # until nothing new is found: a stopped process starts no others
        doomed=' ' pairs='' more=1
        for file in /proc/[0-9]*/stat; do
            { IFS= read -r stat <"$file"; } 2>/dev/null || continue
            after=${stat##*) }
            after=${after#* }
            pairs="$pairs ${stat%% *}:${after%% *}"
        done
        for wanted; do case "$pairs " in *" $wanted:$$ "*) doomed="$doomed$wanted " ;; esac done
        [ "$doomed" != ' ' ] || return 0
        while [ -n "$more" ]; do
            more=''
            for pair in $pairs; do
                case $doomed in
                    *" ${pair%%:*} "*) ;;
                    *" ${pair##*:} "*) doomed="$doomed${pair%%:*} " more=1 ;;
                esac
            done
        done
        [ "$doomed" != "$before" ] || break
        # shellcheck disable=SC2086 # a list of numbers
        kill -STOP $doomed 2>/dev/null
        before=$doomed
    done
    # shellcheck disable=SC2086
    kill -KILL $doomed 2>/dev/null
}

end_all() { # by /proc, not by our list: a signal may come before a new process is in the list
    trap - EXIT
    pids=''
    for file in /proc/[0-9]*/stat; do
        { IFS= read -r stat <"$file"; } 2>/dev/null || continue
        after=${stat##*) }
        after=${after#* }
        [ "${after%% *}" != $$ ] || pids="$pids ${stat%% *}"
    done
    # shellcheck disable=SC2086
    [ -z "$pids" ] || end_tree $pids
}

wait_for_all() {
    while [ -n "$running" ]; do
        left=''
        now
        for entry in $running; do
            pid=${entry%%:*} limit=${entry##*:}
            name=${entry#*:}
            is_alive "$pid" || continue
            if [ $((ticks - began)) -ge "$limit" ]; then
                end_tree "$pid"
                say late "${name%:*}"
            else
                left="$left $entry"
            fi
        done
        running=$left
        [ -z "$running" ] || sleep 0.1 2>/dev/null || sleep 1
    done
}

# --- what is quick -------------------------------------------------------------------------------------------------

clock() {
    seconds=$(date +%s) part=$(date +%N 2>/dev/null)
    case $part in '' | *[!0-9]*) part=500000000 ;; esac # no such format: half a second is the best guess
    say clock "$seconds.$part"
}

identity() {
    read_line "$under/proc/sys/kernel/hostname" && say hostname "$value"
    read_line "$under/proc/sys/kernel/random/boot_id" && say boot "$value"
    say kernel "$(uname -s) $(uname -r)"
    say machine "$(uname -m)"
    say user "$(id -un 2>/dev/null)"
    say uid "$(id -u)"
    say gid "$(id -g)"
    say home "${HOME:-}"
    say shell "${SHELL:-}"
}

signs() { # names only: values are secrets. A value may have lines of its own, so its newlines go first.
    for process in 1 self; do
        { tr '\n\000' ' \n' <"$under/proc/$process/environ"; } 2>/dev/null | sed -n 's/^\([A-Za-z_][A-Za-z0-9_]*\)=.*/\1/p' | sort -u | each_line environ
    done
}

container() {
    [ ! -e "$under/.dockerenv" ] || say container docker
    [ ! -e "$under/run/.containerenv" ] || say container podman
    sed -n 's/.*\(docker\|kubepods\|lxc\|containerd\|libpod\).*/\1/p' "$under/proc/1/cgroup" 2>/dev/null | sort -u | each_line container
    while read -r _ point kind _; do
        [ "$point" != / ] || say root_file_system "$kind"
    done 2>/dev/null <"$under/proc/1/mounts"
    read_line "$under/proc/1/comm" && say first_process "$value"
    grep -q '^flags.*hypervisor' "$under/proc/cpuinfo" 2>/dev/null && say hypervisor 1
}

limits() { # of this process's cgroup and of those above it: each may have a lower limit
    while IFS=: read -r _ kind group; do
        case ",$kind," in
            ,,) places="$under/sys/fs/cgroup $under/sys/fs/cgroup/unified" ;;
            *,cpu,*) places="$under/sys/fs/cgroup/$kind $under/sys/fs/cgroup/cpu" ;;
            *,memory,*) places="$under/sys/fs/cgroup/memory" ;;
            *) continue ;;
        esac
        for place in $places; do
            folder=$place$group
            while :; do
                read_line "$folder/cpu.max" && say cpu_max "$value"
                { read -r quota <"$folder/cpu.cfs_quota_us" && read -r period <"$folder/cpu.cfs_period_us"; } 2>/dev/null && say cpu_max "$quota $period"
                { read -r most <"$folder/memory.max" && read -r used <"$folder/memory.current"; } 2>/dev/null && memory "$folder" "$most" "$used"
                { read -r most <"$folder/memory.limit_in_bytes" && read -r used <"$folder/memory.usage_in_bytes"; } 2>/dev/null && memory "$folder" "$most" "$used"
                [ "$folder" != "$place" ] && [ "$folder" != "$place/" ] || break
                folder=${folder%/*}
            done
        done
    done 2>/dev/null <"$under/proc/self/cgroup"
    while read -r name value _; do
        case $name in MemTotal: | MemAvailable:) say "${name%:}" "$value" ;; esac
    done 2>/dev/null <"$under/proc/meminfo"
    unset OMP_NUM_THREADS OMP_THREAD_LIMIT # nproc takes them for the number of cores
    say cores "$(nproc 2>/dev/null || grep -c '^processor' /proc/cpuinfo 2>/dev/null)"
    sed -n 's/^flags[[:space:]]*: //p' "$under/proc/cpuinfo" 2>/dev/null | sed q | each_line cpu_flags
}

memory() { # FOLDER LIMIT USED   cached pages of files count as used, and are freed when needed
    cached=$(sed -n 's/^\(total_\)\{0,1\}inactive_file //p' "$1/memory.stat" 2>/dev/null | sed -n '$p')
    say memory_max "$2" "$3" "${cached:-0}"
}

tools() {
    for tool in rsync tar git sha256sum base64 setsid timeout curl wget python3 nvidia-smi docker flock; do
        found=$(command -v "$tool" 2>/dev/null) && say tool "$tool" "$found"
    done
}

deployed() { # INDEX ROOT
    [ ! -f "$2/.rlhf-box" ] || say marker "$1"
    each_line deployed "$1" 2>/dev/null <"$2/deployed"
    [ -d "$2/slot" ] || return 0
    place=$1 pid='' start='' boot=''
    for name in run request pid start boot; do
        read_line "$2/slot/$name" || continue
        say slot "$1" "$name" "$value"
        case $name in pid) pid=$value ;; start) start=$value ;; boot) boot=$value ;; esac
    done
    read_line /proc/sys/kernel/random/boot_id
    [ "$boot" != "$value" ] || ! is_running "$pid" "$start" || say slot_alive "$place"
}

# --- what may be slow ----------------------------------------------------------------------------------------------

place() { # INDEX ROOT   the folder, or its nearest parent that exists; a network disk that is gone hangs
    at=$2 missing=''
    while [ ! -e "$at" ] && [ ! -L "$at" ] && [ -n "$at" ]; do
        missing=$at
        case $at in */*) at=${at%/*} ;; *) at= ;; esac
    done
    at=${at:-/}
    writable=0 folder=0
    [ ! -w "$at" ] || writable=1
    [ ! -d "$at" ] || folder=1
    say place "$1" "$writable" "$folder" "$(stat -L -c %u "$at" 2>/dev/null)" "$at"
    [ -z "$missing" ] || say missing "$1" "$missing"
    df -P -k "$at" 2>/dev/null | sed -n 2p | each_line disk "$1"
    df -P -i "$at" 2>/dev/null | sed -n 2p | each_line inodes "$1"
    point=$(df -P "$at" 2>/dev/null | sed -n '2s/.*% *\//\//p')
    while read -r _ mounted kind options _; do
        [ "$mounted" != "$point" ] || say mount "$1" "$kind" "$options"
    done 2>/dev/null </proc/self/mounts
}

free_at() { # KEY FOLDER
    [ ! -d "$2" ] || df -P -k "$2" 2>/dev/null | sed -n 2p | each_line "$1"
}

smi() { # KEY QUERY   each card is a line; any other output is an error
    text=$(nvidia-smi "$2" --format=csv,noheader,nounits 2>&1)
    code=$?
    printf '%s\n' "$text" | sed 's/, /|/g' | while IFS= read -r line; do
        case $line in
            [0-9]*"|"*"|"* | GPU-*"|"*) [ $code -ne 0 ] || printf '%s\t%s\n' "$1" "$line" ;;
            '' | 'No devices were found') ;;
            *) say smi_error "$1" "$line" ;;
        esac
    done
}

holders() { # who holds memory; in a container by the host's pids, which are unknown here
    nvidia-smi --query-compute-apps=gpu_uuid,pid,used_memory --format=csv,noheader,nounits 2>/dev/null | while IFS=', ' read -r uuid pid used; do
        case $pid in '' | *[!0-9]*) ;; *) say holder "$uuid" "$pid" "$used" "$(command_of "$pid")" ;; esac
    done
}

with_cards_open() { # as `fuser /dev/nvidia*` does it, without our own
    # shellcheck disable=SC2012 # find cannot print what a link says in busybox
    ls -l /proc/[0-9]*/fd 2>/dev/null | sed -n 's|^/proc/\([0-9]*\)/fd:$|\1|p; s|.* -> /dev/nvidia[0-9][0-9]*$|open|p' | while read -r word; do
        [ "$word" = open ] || {
            pid=$word
            continue
        }
        [ -n "$pid" ] || continue
        { IFS= read -r stat <"/proc/$pid/stat"; } 2>/dev/null && group=${stat##*) } && group=${group#* } && group=${group#* }
        [ "${group%% *}" = "$1" ] || say opener "$pid" "$(command_of "$pid")"
        pid=''
    done
}

cards() {
    smi gpu --query-gpu=index,uuid,pci.bus_id,memory.total,memory.used,utilization.gpu,driver_version,name
    say gpus_asked 1
    holders
    # Only now, since the copies themselves take memory on each card.
    [ "$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')" -gt 1 ] || return 0
    for python in python3 python3.10 python "$@"; do
        expand "$python"
        has "$path" || continue
        peers "$path"
        return 0
    done
    say peers 'no Python here to try it with'
}

topology() { # the matrix, without its legend
    nvidia-smi topo -m 2>/dev/null | tr -d '\033' | sed 's/\[[0-9;]*m//g' | sed -n '/GPU0/,/^[[:space:]]*$/p' | each_line topology
}

kernel_log() {
    text=$(dmesg 2>/dev/null) || return 0
    say kernel_log 1
    printf '%s\n' "$text" | grep 'NVRM: Xid' | tail -n 50 | each_line xid
}

docker_daemon() {
    say docker "$(docker --version 2>/dev/null | sed q)"
    text=$(docker info --format '{{.ServerVersion}}|{{.DefaultRuntime}}|{{range $name, $_ := .Runtimes}}{{$name}} {{end}}|{{.DockerRootDir}}' 2>&1)
    code=$?
    # There may be warnings before the formatted line. Without a daemon some versions still end with 0.
    info=$(printf '%s\n' "$text" | grep '^[0-9][^|]*|' | sed q)
    if [ $code -eq 0 ] && [ -n "$info" ]; then
        printf 'docker_daemon\t%s\n' "$info"
    else
        said=$(printf '%s\n' "$text" | grep -v '^|' | grep -v '^$')
        plain=$(printf '%s\n' "$said" | grep -v '^template:') # the template's own error about a missing answer
        say docker_error "$(first_line "${plain:-$said}")"
    fi
}

docker_compose() { docker compose version --short 2>/dev/null | sed q | each_line docker_compose; }
docker_buildx() { docker buildx version 2>/dev/null | sed q | each_line docker_buildx; }

docker_gpu() { # really try the runtime, with an image that is there: nothing is pulled
    [ -e /dev/nvidiactl ] || has nvidia-smi || return 0
    images=$(docker image ls --format '{{.Repository}}:{{.Tag}}' 2>/dev/null | grep -v '<none>')
    image=$(printf '%s\n' "$images" | grep '^rlhf-box:' | sed q)
    image=${image:-$(first_line "$images")}
    [ -n "$image" ] || {
        say docker_gpu 'no image is here'
        return 0
    }
    text=$(docker run --rm --name "$1" --pull never --network none --env NVIDIA_DRIVER_CAPABILITIES=utility --gpus all --entrypoint nvidia-smi "$image" -L 2>&1)
    say docker_gpu "$?" "$(printf '%s\n' "$text" | grep -c '^GPU ')" "$image" "$(first_line "$text")"
}

python_at() { # PATH
    expand "$1"
    found=$(command -v "$path") || return 0
    text=$("$found" -c 'import sys
try:
    import ensurepip, venv
    whole = 1
except ImportError:
    whole = 0
print("%d.%d.%d|%d" % (sys.version_info[:3] + (whole,)))' 2>/dev/null) || return 0
    say python "${text%%|*}" "${text#*|}" "$found"
}

conda_at() { # PATH
    expand "$1"
    found=$(command -v "$path") || return 0
    text=$("$found" --version 2>/dev/null) || return 0
    say conda "$(first_line "$text")" "$found"
}

rsync_version() { rsync --version 2>/dev/null | sed q | each_line rsync; }
tar_version() { tar --version 2>&1 | sed q | each_line tar; }

no_proxy_at_all() { unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY; }

direct_way() { # NAME URL
    no_proxy_at_all
    fetch "$1" "$2"
}

proxied_way() { # URL FILE...   the environment's proxy, or the first file that sets one
    url=$1
    shift
    for file; do
        [ -n "${https_proxy:-}${HTTPS_PROXY:-}${all_proxy:-}${ALL_PROXY:-}" ] && break
        # shellcheck disable=SC1090 # the provider's own
        [ ! -r "$file" ] || . "$file" >/dev/null 2>&1
    done
    [ -n "${https_proxy:-}${HTTPS_PROXY:-}${all_proxy:-}${ALL_PROXY:-}" ] || return 0
    export http_proxy https_proxy all_proxy HTTPS_PROXY ALL_PROXY
    fetch proxy "$url"
}

fetch() { # NAME URL   says: name, HTTP status, seconds until connected, seconds in all, bytes, what went wrong
    now
    from=$ticks
    if has curl; then
        text=$(curl -sS -L --max-redirs 5 -r 0-1023 --connect-timeout 4 --max-time 4 -o /dev/null -w '%{http_code}|%{time_connect}|%{time_total}|%{size_download}' "$2" 2>&1)
        numbers=$(printf '%s\n' "$text" | grep '^[0-9]*|[0-9.]*|[0-9.]*|[0-9]*$' | sed -n '$p')
        said=$(printf '%s\n' "$text" | grep '^curl' | sed q)
        printf 'hub\t%s|%s|%s\n' "$1" "${numbers:-000|||}" "$(printf %s "$said" | tr -d '\000-\037\177')"
        return 0
    elif has wget; then
        size=$(wget -q -T 4 -O - "$2" 2>/dev/null | wc -c)
    elif has python3; then
        size=$(python3 -c 'import sys, urllib.request
print(len(urllib.request.urlopen(sys.argv[1], timeout=4).read(1024)))' "$2" 2>/dev/null)
    else
        say hub "$1" '' '' '' '' 'there is no curl, wget or python3'
        return 0
    fi
    now
    took=$((ticks - from)) code=200 said=''
    [ "${size:-0}" -gt 0 ] || code='' said='nothing came'
    say hub "$1" "$code" '' "$((took / 100)).$((took / 10 % 10))$((took % 10))" "$((${size:-0}))" "$said"
}

peers() { # PYTHON   all cards, as nvidia-smi numbers them
    unset CUDA_VISIBLE_DEVICES
    export CUDA_DEVICE_ORDER=PCI_BUS_ID
    "$1" - <<'PEERS'
@GPU_COPY_CHECK@
PEERS
}

# --- all of it -----------------------------------------------------------------------------------------------------

now
began=$ticks
clock
container_name=rlhf-box-probe-$$
trap 'end_all' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

for argument; do case $argument in under=*) under=${argument#*=} ;; esac; done
own_group=''
{ IFS= read -r stat <"/proc/$$/stat"; } 2>/dev/null && own_group=${stat##*) } && own_group=${own_group#* } && own_group=${own_group#* }

index=0
for argument; do
    value=${argument#*=}
    case $argument in
        root=*)
            expand "$value"
            say root "$index" "$path"
            start "disk$index" 350 place "$index" "$path"
            start "deployed$index" 350 deployed "$index" "$path"
            index=$((index + 1))
            ;;
        file=*)
            expand "$value"
            [ ! -e "$under$path" ] || say file "$value"
            ;;
        python=*)
            pythons="${pythons:-} $value"
            start python 400 python_at "$value"
            ;;
        conda=*) start conda 400 conda_at "$value" ;;
        proxy=*) proxies="${proxies:-} $under$value" ;;
        direct=*) direct=$value ;;
        mirror=*) mirror=$value ;;
    esac
done
[ -z "${direct:-}" ] || start hub_direct 450 direct_way direct "$direct"
[ -z "${mirror:-}" ] || start hub_mirror 450 direct_way mirror "$mirror"
# shellcheck disable=SC2086 # paths from providers/*.toml, without spaces
[ -z "${direct:-}" ] || start hub_proxy 450 proxied_way "$direct" ${proxies:-}

if has nvidia-smi; then
    start open_cards 350 with_cards_open "${own_group%% *}"
    # shellcheck disable=SC2086
    start cards 520 cards ${pythons:-}
    start capability 450 smi capability --query-gpu=index,uuid,compute_cap
    start ecc 450 smi ecc --query-gpu=index,ecc.errors.uncorrected.volatile.total,ecc.errors.uncorrected.aggregate.total
    start topology 450 topology
fi
if has docker; then
    start docker 400 docker_daemon
    start docker_compose 400 docker_compose
    start docker_buildx 400 docker_buildx
    start docker_gpu 500 docker_gpu "$container_name"
fi
start kernel_log 300 kernel_log
start shm 300 free_at shm /dev/shm
start home_disk 300 free_at home_disk "${HOME:-/}"
for name in python3.10 python3 python python3.11 python3.12; do start python 400 python_at "$name"; done
for name in conda mamba micromamba uv; do start conda 400 conda_at "$name"; done
start rsync 200 rsync_version
start tar 200 tar_version

say probe 1
identity
signs
container
limits
tools
sed -n '/^NVRM version:/p' "$under/proc/driver/nvidia/version" 2>/dev/null | each_line nvrm
for file in "$under"/dev/nvidia[0-9]*; do [ ! -e "$file" ] || say card_file "${file##*/}"; done

wait_for_all
now
say end "$(((ticks - began) * 10))"
