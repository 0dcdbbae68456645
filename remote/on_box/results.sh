#!/bin/sh
# Lists the results of a box, sends them, stops the box, and removes our files. It is sent by standard input with each call, so it needs
# nothing that is deployed, and may remove all of it. Its verbs, answers and exit codes: PROTOCOL.md.
#
# It decides what is complete, although files may change meanwhile: a step by its complete.json and model/, a checkpoint by its
# complete.json. For a file that grows, the length at the first look counts.

LC_ALL=C PATH="${PATH:-/usr/bin:/bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
export LC_ALL PATH
umask 022
# shellcheck source=remote/on_box/lib.sh
. "$(dirname -- "$0")/lib.sh"
cd / || exit 1
newline='
'
tab=$(printf '\t')

say() { printf '%s\n' "$*"; }

sha_of() { # standard input -> its sha256, or nothing
    if has sha256sum; then
        sum=$(sha256sum) || return 1
        printf %s "${sum%% *}"
    else
        sum=$(openssl dgst -sha256 2>/dev/null) || return 1
        printf %s "${sum##* }"
    fi
}

stat_of() { # FILE   what changes when it is written to
    stat -c '%i %s %y %z' -- "$1" 2>/dev/null
}

sum_of() { # FOLDER...   the bytes of all files in them
    find -H "$@" -type f -exec stat -c %s {} + 2>/dev/null | {
        total=0
        while read -r bytes; do total=$((total + bytes)); done
        printf %s "$total"
    }
}

# --- what is complete ------------------------------------------------------------------------------------------------

is_complete() { [ -s "$1/complete.json" ] && [ -d "$1/model" ]; } # the folder of a step

newest_checkpoint() { # FOLDER of a step   sets update; older ones are not wanted
    update=''
    for found in "$1"/checkpoints/update-*/complete.json; do
        number=${found%/complete.json}
        number=${number##*/update-}
        is_number "$number" && [ -s "$found" ] || continue
        [ -n "$update" ] && [ "$update" -ge "$number" ] || update=$number
    done
    [ -n "$update" ]
}

id_of() { # FOLDER of a run   sets value: the run's id; a run that was begun before there were ids has none
    read_line "$1/id" || return 1
    case $value in '' | *[!0-9A-Za-z-]*) return 1 ;; esac
}

# --- look ------------------------------------------------------------------------------------------------------------

look() {
    [ -d "$root" ] || return 0
    say root "$(cd "$root" 2>/dev/null && pwd -P)"
    [ ! -f "$root/.rlhf-box" ] || say marked
    running
    [ -z "$elsewhere" ] || say elsewhere "$elsewhere"
    for folder in "$root"/runs/*/; do
        [ -d "$folder" ] || continue
        folder=${folder%/}
        say run "${folder##*/}"
        ! id_of "$folder" || say id "$value"
        [ ! -f "$folder/events.jsonl" ] || say events "$(stat -L -c %s "$folder/events.jsonl")"
        for step in 1 2 3; do
            place=$folder/step$step
            if is_complete "$place"; then
                say step $step "$(sha_of <"$place/complete.json")" "$(sum_of "$place/model" "$place/model_ema" "$place/best")"
            elif newest_checkpoint "$place"; then
                say checkpoint $step "$update" "$(sha_of <"$place/checkpoints/update-$update/complete.json")" "$(sum_of "$place/checkpoints/update-$update")"
            fi
        done
    done
}

# --- what runs -------------------------------------------------------------------------------------------------------

requests() { # of this folder, a line each: they tell our jobs from other people's
    for found in "$root"/requests/*/; do
        found=${found%/}
        [ ! -d "$found" ] || printf '%s\n' "${found##*/}"
    done
    for found in "$root"/runs/*/job/request "$root/slot/request"; do
        ! read_line "$found" || printf '%s\n' "$value"
    done
}

request_of() { # PID   sets value: the request in its environment
    value=$({ tr '\000\n' '\n ' <"/proc/$1/environ"; } 2>/dev/null | sed -n 's/^RLHF_REQUEST=//p' | sed q)
    [ -n "$value" ]
}

of_a_job() { # lines `PID REQUEST`: every process that a job has started
    grep -lsF RLHF_REQUEST= /proc/[0-9]*/environ 2>/dev/null | while IFS=/ read -r _ _ pid _; do
        is_alive "$pid" || continue
        ! request_of "$pid" || printf '%s %s\n' "$pid" "$value"
    done
}

names_root() { # pids of processes with ROOT in their command line, without this script, its parents and its children
    own=' ' each=$$
    while is_number "$each" && [ "$each" -gt 1 ] && fields_of "$each"; do own="$own$each " each=$parent; done
    for name in "$root" "$real"; do grep -lsF -e "$name" /proc/[0-9]*/cmdline 2>/dev/null; done | sort -u | while IFS=/ read -r _ _ pid _; do
        case $own in *" $pid "*) continue ;; esac
        is_alive "$pid" || continue
        # A root `/data/a` does not stand in `/data/ab`.
        { tr '\000\n' '\n ' <"/proc/$pid/cmdline"; } 2>/dev/null | is_named || continue
        each=$pid
        while is_number "$each" && [ "$each" -gt 1 ] && [ "$each" != $$ ] && fields_of "$each"; do each=$parent; done
        [ "$each" = $$ ] || printf '%s\n' "$pid"
    done
}

is_named() { # standard input: words
    while IFS= read -r word; do
        for name in "$root" "$real"; do
            case "$word/" in *"$name"[/:\ \'\"]*) return 0 ;; esac
        done
    done
    return 1
}

running() { # `running RUN REQUEST`, if there is a job: its supervisor, its processes, or its container
    # sets elsewhere: the host on which it runs, if that shares the folder with this one
    pid='' since_then='' request='' run='' elsewhere=''
    read_line "$root/slot/run" && run=$value
    read_line "$root/slot/request" && request=$value
    read_line "$root/slot/pid" && pid=$value
    read_line "$root/slot/start" && since_then=$value
    place
    read_line "$root/slot/boot"
    sight "$value"
    if [ $where != here ] && [ -n "$request" ] && read_line "$root/runs/$run/job/request" && [ "$value" = "$request" ] && [ ! -e "$root/runs/$run/job/exit" ] && hears "$root/runs/$run/job/heartbeat"; then
        elsewhere=$their_host
        say running "${run:--}" "$request"
        return
    fi
    if [ $where = here ] && is_running "$pid" "$since_then"; then
        say running "${run:--}" "${request:--}"
        return
    fi
    ours=$newline$(requests)$newline
    found=$(of_a_job | while read -r pid request; do case $ours in *"$newline$request$newline"*) say "$request" && break ;; esac done)
    [ -n "$found" ] || ! has docker || found=$(docker ps --filter name=rlhf-box- --format '{{.Names}}' </dev/null 2>/dev/null | while read -r name; do
        case $ours in *"$newline${name#rlhf-box-}$newline"*) say "${name#rlhf-box-}" && break ;; esac
    done)
    [ -n "$found" ] || return 0
    for each in "$root"/runs/*/job/request; do
        read_line "$each" && [ "$value" = "$found" ] || continue
        run=${each%/job/request}
        run=${run##*/}
    done
    say running "${run:--}" "$found"
}

# --- manifest --------------------------------------------------------------------------------------------------------

hash_file() { # NAME below the run   sets sha and bytes; those of an unchanged file are remembered
    before=$(stat_of "$run/$1") && [ ! -L "$run/$1" ] && [ -f "$run/$1" ] || return 1
    bytes=${before#* }
    bytes=${bytes%% *}
    entry="$newline$before$tab$1$tab"
    case $known in
        *"$entry"*)
            sha=${known#*"$entry"}
            sha=${sha%%"$newline"*}
            ;;
        *)
            say hashing "$bytes" "$1"
            sha=$(sha_of <"$run/$1") && [ ${#sha} -eq 64 ] && [ "$(stat_of "$run/$1")" = "$before" ] || return 1
            ;;
    esac
    now_known=$now_known$before$tab$1$tab$sha$newline
}

one_file() { # NAME
    [ -e "$run/$1" ] || return 0
    hash_file "$1" || return 1
    say file "$bytes" "$sha" "$1"
}

each_file() { # FOLDER below the run   all files in it
    [ -d "$run/$1" ] || return 0
    odd=$((odd + $(find -H "$run/$1" -type f -name '*[[:cntrl:]]*' -exec printf . \; 2>/dev/null | wc -c)))
    names=$(find -H "$run/$1" -type f ! -path '*[[:cntrl:]]*' 2>/dev/null)
    while IFS= read -r name; do
        [ -z "$name" ] || one_file "${name#"$run/"}" || return 1
    done <<NAMES
$names
NAMES
}

grown_file() { # NAME [lines]   up to its present length; with `lines` to the end of its last whole line
    [ -f "$run/$1" ] || return 0
    bytes=$(stat -L -c %s "$run/$1") || return 0
    if [ "${2-}" = lines ] && [ "$bytes" -gt 0 ] && [ -n "$(head -c "$bytes" <"$run/$1" | tail -c 1)" ]; then
        bytes=$((bytes - $(head -c "$bytes" <"$run/$1" | tail -n 1 | wc -c)))
    fi
    sha=$(head -c "$bytes" <"$run/$1" | sha_of) || return 0
    say grown "$bytes" "$sha" "$1"
}

first_event() { # its hash tells a run from another one, also where there is no id
    [ -f "$run/events.jsonl" ] && [ "$(head -n 1 <"$run/events.jsonl" | wc -l)" -eq 1 ] || return 0
    sha=$(head -n 1 <"$run/events.jsonl" | sha_of) && say began "$sha"
}

a_step() { # NUMBER   all that a complete one holds
    mark=$(sha_of <"$run/step$1/complete.json") || return 1
    for part in model model_ema best; do each_file "step$1/$part" || return 1; done
    one_file "step$1/fields.json" && one_file "step$1/complete.json" || return 1
    is_complete "$run/step$1" && [ "$(sha_of <"$run/step$1/complete.json")" = "$mark" ] || return 1
    say step "$1" "$mark"
}

a_checkpoint() { # NUMBER UPDATE [whole]   its files' hashes are in its complete.json
    at=step$1/checkpoints/update-$2
    text=$(cat "$run/$at/complete.json" 2>/dev/null && printf .) || return 1
    text=${text%.}
    say checkpoint "$1" "$2" "$(printf %s "$text" | sha_of)" "$(sum_of "$run/$at")"
    [ -n "${3-}" ] || return 0
    one_file "step$1/fields.json" || return 1
    say text ${#text} "$at/complete.json"
    printf %s "$text"
}

manifest() { # RUN [checkpoints]
    [ -d "$root/runs" ] && [ -f "$root/.rlhf-box" ] || {
        say no_root
        return
    }
    run=$root/runs/$1 odd=0 now_known=''
    if [ ! -d "$run" ]; then
        say no_run
        for folder in "$root"/runs/*/; do
            folder=${folder%/}
            [ ! -d "$folder" ] || say has "${folder##*/}"
        done
        return
    fi
    remembered=$root/cache/results/$1
    known=$newline$(cat "$remembered" 2>/dev/null)$newline
    if id_of "$run"; then
        say text $((${#value} + 1)) id
        say "$value"
    fi
    first_event
    grown_file events.jsonl lines
    grown_file train.log
    one_file job.yaml
    one_file format
    each_file chats
    [ -z "${2-}" ] || each_file tokenizer
    for step in 1 2 3; do
        if is_complete "$run/step$step"; then
            a_step $step || say changed $step
        elif newest_checkpoint "$run/step$step"; then
            a_checkpoint $step "$update" "${2-}" || say changed $step
        fi
    done
    [ $odd -eq 0 ] || say odd $odd
    if [ "$newline$now_known" != "$known" ]; then # by rename, and only if there is room
        { mkdir -p "${remembered%/*}" && printf %s "$now_known" >"$remembered.$$" && mv -f "$remembered.$$" "$remembered"; } 2>/dev/null
        rm -f "$remembered.$$"
    fi
}

send() { # RUN [OFFSET SIZE FILE]...   bytes OFFSET to SIZE of each, in one go
    run=$root/runs/$1 index=0
    shift
    while [ $# -ge 3 ]; do
        opened=''
        bytes=$(stat -c %s -- "$run/$3" 2>/dev/null)
        if [ -n "$bytes" ] && [ "$bytes" -ge "$2" ] && [ ! -L "$run/$3" ] && [ -f "$run/$3" ]; then
            {
                opened=1 # the file may be removed from here on, since it stays open
                say bytes $index $(($2 - $1)) || exit 0
                tail -c "+$(($1 + 1))" 2>/dev/null | head -c $(($2 - $1))
            } <"$run/$3" 2>/dev/null
        fi
        [ -n "$opened" ] || say gone $index || exit 0
        index=$((index + 1))
        shift 3
    done
}

# --- stop ------------------------------------------------------------------------------------------------------------

stop() { # ENVIRON VARIABLE... -- COMMAND...
    environ=$1
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        case $1 in
            '' | [!A-Za-z_]* | *[!A-Za-z0-9_]*) exit 2 ;;
        esac
        # A value may have several lines: their newlines become a character that no value has, and are put back.
        value=$({ tr '\n\000' '\001\n' <"$environ"; } 2>/dev/null | sed -n "s/^$1=//p" | sed q | tr '\001' '\n' && printf .)
        value=${value%.}
        value=${value%"$newline"}
        [ -z "$value" ] || export "$1=$value"
        shift
    done
    shift
    exec "$@" </dev/null
}

# --- purge -----------------------------------------------------------------------------------------------------------

refuse() { # WHY TEXT...
    say refused "$@"
    exit 0
}

containers() { # [running]   names, of our jobs and of ended jobs of others; a running job of another folder is left alone
    docker ps --all --format '{{.Names}}|{{.Image}}|{{.Status}}' </dev/null 2>/dev/null | while IFS='|' read -r name image status; do
        case $name in
            rlhf-box-*) ;;
            *) case $image in rlhf-box:*) ;; *) continue ;; esac ;;
        esac
        case $ours in *"$newline${name#rlhf-box-}$newline"*) status='' ;; esac
        case $status in Up*) [ -n "${1-}" ] || continue ;; esac
        printf '%s\n' "$name"
    done
}

images() { docker image ls --format '{{.Repository}}:{{.Tag}}' rlhf-box </dev/null 2>/dev/null | sed -n '/^rlhf-box:/p'; }

volumes() { docker volume ls --quiet --filter label=com.docker.compose.project=rlhf-box </dev/null 2>/dev/null; }

networks() { docker network ls --quiet --filter label=com.docker.compose.project=rlhf-box </dev/null 2>/dev/null; }

each_one() { # SORT COMMAND...   for each line of standard input
    sort=$1
    shift
    while IFS= read -r word; do "$@" "$word" </dev/null >/dev/null 2>&1 && say removed "$sort $word"; done
}

may_purge() {
    case $root in
        / | /*/../* | */.. | /*/./* | */. | [!/]* | '') refuse not_ours "$root is not a folder of its own" ;;
    esac
    [ ! -L "$root" ] || refuse not_ours "$root is a link"
    [ -d "$root" ] || return 0
    [ -f "$root/.rlhf-box" ] && [ ! -L "$root/.rlhf-box" ] || refuse not_ours "$root has no .rlhf-box, the mark of our folder"
    [ "$real" != / ] || refuse not_ours "$root is /"
    found=$(running)
    [ -z "$found" ] || refuse busy "${found#running }"
    if [ -d "$root/lock" ]; then
        until=$(sed -n 's/^expires //p' "$root/lock/owner" 2>/dev/null)
        ! is_number "$until" || [ "$until" -le "$(date +%s)" ] || refuse locked "$(sed -n 's/^who //p' "$root/lock/owner" | sed q)"
    fi
    # A mount below is another file system, which is never entered.
    while read -r _ _ _ _ point _; do
        case $point in *\\*) point=$(printf '%b.' "$(printf %s "$point" | sed 's/\\\([0-7][0-7][0-7]\)/\\0\1/g')") ;; *) point=$point. ;; esac
        case ${point%.} in "$real"/*) refuse mounted "${point%.}" ;; esac
    done </proc/self/mountinfo
}

remaining() { [ -d "$root" ] && [ -n "$(find "$real" -mindepth 1 -maxdepth 1 ! -name .rlhf-box 2>/dev/null | sed q)" ]; }

remove() { # all in ROOT, and the marker last, so that a removal that broke off can be repeated
    set -- find "$real" -xdev -mindepth 1 -maxdepth 1 ! -name .rlhf-box -exec rm -rf -- {} +
    "$@" </dev/null 2>/dev/null
    if remaining; then # folders that may not be written to
        find "$real" -xdev -type d ! -perm -700 -exec chmod u+rwx {} + </dev/null 2>/dev/null
        "$@" </dev/null 2>/dev/null
    fi
    if remaining && has docker; then # files of another user, as containers may leave them: a container may remove them
        image=$(images | sed q)
        if [ -n "$image" ] && docker run --rm --pull never --network none --user 0:0 --entrypoint find --mount "type=bind,source=$real,target=/purge" "$image" \
            /purge -xdev -mindepth 1 -maxdepth 1 ! -name .rlhf-box -exec rm -rf -- {} + </dev/null >/dev/null 2>&1; then
            say removed "files of other users, by a container of $image"
        fi
    fi
    if remaining && has sudo && sudo -n true </dev/null 2>/dev/null; then
        sudo -n "$@" </dev/null 2>/dev/null && say removed 'files of other users, by sudo'
    fi
    remaining || { rm -f "$real/.rlhf-box" && rmdir "$real" && say removed "$root"; } 2>/dev/null
}

freed() { # says each second how much more room the disk of ROOT has, until it is ended
    above=${real%/*}
    before=$(free_kb "${above:-/}")
    while sleep 1 >/dev/null 2>&1; do
        kb=$(free_kb "${above:-/}")
        is_number "$before" && is_number "$kb" && [ "$kb" -ge "$before" ] || kb=$before
        say freed $((kb - before))
    done
}

purge() {
    real=$(cd "$root" 2>/dev/null && pwd -P)
    real=${real:-$root}
    may_purge
    ours=$newline$(requests)$newline
    freed &
    clock=$!
    if has docker; then
        containers | each_one container docker rm -f
    fi
    [ ! -d "$root" ] || remove
    if has docker; then
        images | each_one image docker rmi
        volumes | each_one volume docker volume rm
        networks | each_one network docker network rm
    fi
    { kill $clock && wait $clock; } 2>/dev/null
    prove
}

would_purge() { # in the order of purge
    real=$(cd "$root" 2>/dev/null && pwd -P)
    real=${real:-$root}
    may_purge
    ours=$newline$(requests)$newline
    ! has docker || containers | would container
    if [ -d "$root" ]; then
        say would "$root, $(du -sxk "$real" 2>/dev/null | sed -n '$s/[^0-9].*//p') kB"
    fi
    if has docker; then
        images | would image
        volumes | would volume
        networks | would network
    fi
    what_stays
}

would() { # SORT   for each line of standard input
    while IFS= read -r word; do say would "$1 $word"; done
}

what_stays() {
    ! has docker || ! docker version </dev/null >/dev/null 2>&1 ||
        say note 'the cache of image builds is shared with others and stays; docker builder prune empties it'
    [ ! -s "${HOME:-}/.ssh/authorized_keys" ] || say note 'your key stays in ~/.ssh/authorized_keys, since it lets you log in'
}

prove() {
    if [ -e "$root" ] || [ -L "$root" ]; then
        left=$(find "$real" -xdev 2>/dev/null | sed -n '2p')
        say proof folder left "$root: $(find "$real" -xdev -mindepth 1 2>/dev/null | wc -l | tr -d ' ') files and folders, the first ${left:-is the folder itself}"
    else
        say proof folder ok "$root is gone"
    fi
    left=$(of_a_job | while read -r pid request; do
        case $ours in
            *"$newline$request$newline"*) say proof processes left "$pid $(command_of "$pid")" ;;
            *) say note "process $pid belongs to a job that is not known in this folder" ;;
        esac
    done)
    named=$(names_root | while read -r pid; do say proof processes left "$pid $(command_of "$pid")"; done)
    [ -z "$left" ] || say "$left"
    [ -z "$named" ] || say "$named"
    case $left$named in *'proof processes'*) ;; *) say proof processes ok 'no process of a job, and none that names the folder' ;; esac
    if ! has docker; then
        say proof docker ok 'there is no Docker'
    elif ! docker version </dev/null >/dev/null 2>&1; then
        say proof docker ok 'its daemon does not answer: nothing of ours can run there'
    else
        left=$(containers running && images && volumes && networks)
        if [ -z "$left" ]; then
            say proof docker ok 'no container, image, volume or network of ours'
        else
            say proof docker left "$(printf %s "$left" | tr '\n' ' ')"
        fi
    fi
    what_stays
}

# --------------------------------------------------------------------------------------------------------------------

printf '\nbegin\n' # a login may have said something
verb=$1
shift
case $verb in
    stop) stop "$@" ;;
    look | manifest | send | purge | would_purge)
        root=$1
        shift
        case $root in ?*/) root=${root%/} ;; esac
        "$verb" "$@"
        ;;
    *) exit 2 ;;
esac
say end
