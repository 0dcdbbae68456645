#!/bin/sh
# shellcheck disable=SC2153 # variables of the flavour
# Makes the environment of jobs on the box: a virtual environment from the locks (bare), or the image (docker). Called by
# remote/deploy/deployment.py. Its words, answers and exit codes: PROTOCOL.md. All output of the programs goes to ROOT/env/KEY.log.
#
# ROOT/env/KEY is made in its place, since a virtual environment cannot be moved. It has the file `complete` only when it is whole; if a
# call is killed, the next one starts from scratch. While it runs, it renews the lock of its deploy. It ends with its connection.
set -eu
LC_ALL=C PATH="${PATH:-/usr/bin:/bin}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
export LC_ALL PATH
umask 022
# shellcheck source=remote/on_box/lib.sh
. "$(dirname -- "$0")/lib.sh"

root='' token='' key='' runtime='' flavour='' torch='' mirror=default device=cuda python='' maker='' proxy='' ca_bundle=''
build_arguments='' newline='
'
for word; do
    value=${word#*=}
    case $word in
        root=*) root=$value ;; token=*) token=$value ;; key=*) key=$value ;; runtime=*) runtime=$value ;;
        flavour=*) flavour=$value ;; torch=*) torch=$value ;;
        mirror=*) mirror=$value ;; device=*) device=$value ;; python=*) python=$value ;; maker=*) maker=$value ;;
        proxy=*) proxy=$value ;; ca_bundle=*) ca_bundle=$value ;; arg=*) build_arguments="$build_arguments$value$newline" ;;
    esac
done
code=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd -P)
pins=$code/env/pins
environment=$root/env/$key
log=$root/env/$key.log
lock_s=120 # for how long each beat renews the lock
child=''

say() { printf '%s\n' "$*" || end_child; }

refuse() { # WHAT HINT [WHY]
    say "refused $1"
    [ -z "${3:-}" ] || printf '%s\n' "$3" | sed 's/^/why /'
    say "hint $2"
    exit 3
}

end_child() { # and all processes that it has started: it leads a group of its own
    trap '' PIPE TERM HUP INT
    [ -z "$child" ] || kill -TERM "-$child" 2>/dev/null || kill -TERM "$child" 2>/dev/null
    exit 143
}
trap end_child PIPE TERM HUP INT

keep_lock() { # our lock, if it is still ours or nobody's
    [ "$(sed -n 's/^token //p' "$root/lock/owner" 2>/dev/null)" = "$token" ] || return 0
    { echo $(($(date +%s) + lock_s)) >"$root/lock/renewed.new" && mv "$root/lock/renewed.new" "$root/lock/renewed"; } 2>/dev/null || return 0
}

stage() { # NAME HINT COMMAND...
    name=$1 hint=$2 began=$(date +%s) said='' round=0
    shift 2
    say "begin $name"
    if has setsid; then setsid "$@" >>"$log" 2>&1 </dev/null & else "$@" >>"$log" 2>&1 </dev/null & fi
    child=$!
    ! is_alive "$child" || echo "$child $since" >"$environment.child" || true
    while is_alive "$child"; do
        if [ $round -lt 10 ]; then sleep 0.1 2>/dev/null || sleep 1; else sleep 1; fi
        round=$((round + 1))
        [ $round -ge 10 ] || continue
        say beat
        keep_lock
        # shellcheck disable=SC2016 # ${g;p;} is for sed
        last=$(tail -c 2000 "$log" 2>/dev/null | tr '\r' '\n' | tr -d '\000-\011\013-\037\177' | sed -n '/[^[:space:]]/h; ${g;p;}' | cut -c 1-200)
        [ "$last" = "$said" ] || say "now $last"
        said=$last
    done
    status=0
    wait "$child" || status=$?
    child=''
    rm -f "$environment.child"
    if [ $status -ne 0 ]; then
        free=$(free_kb "$root/env")
        # pip removes its files when it fails, so the disk may have room again by now.
        if [ "${free:-2048}" -le 1024 ] || tail -n 20 "$log" | grep -q 'No space left on device\|Disk quota exceeded'; then
            refuse "the disk is full, at: $name" "make room at $root, or name another data_folder in boxes.yaml" "$(tail -n 3 "$log")"
        fi
        refuse "cannot make the environment: $name" "$hint" "exit code $status; the last lines of $log:$newline$(tail -n 10 "$log")"
    fi
    say "done $(($(date +%s) - began)) $name"
}

# --- where things come from ------------------------------------------------------------------------------------------

[ -r "$code/env/flavours/$flavour.env" ] || refuse "there is no flavour $flavour" "name a file of env/flavours"
[ -r "$code/env/mirrors/$mirror.env" ] || refuse "there is no mirror $mirror" "name a file of env/mirrors in boxes.yaml"
unset HF_ENDPOINT PIP_CONSTRAINT PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PYTHONHOME PYTHONPATH PYTHONPYCACHEPREFIX CONDA_CHANNEL
# shellcheck disable=SC1090
. "$code/env/flavours/$flavour.env"
set -a
# shellcheck disable=SC1090
. "$code/env/mirrors/$mirror.env"
# The proxy is for addresses abroad. Packages of a mirror come directly: through both is slower than through either.
# shellcheck disable=SC1090
if [ -z "${PIP_INDEX_URL:-}" ] && [ -r "$proxy" ]; then . "$proxy" >/dev/null 2>&1 || true; fi
set +a
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# The self-check imports packages that make folders in the home when they are imported.
cache=$root/cache
# shellcheck source=env/caches.sh
. "$code/env/caches.sh"
if [ -n "$ca_bundle" ]; then
    export PIP_CERT="$ca_bundle" SSL_CERT_FILE="$ca_bundle" REQUESTS_CA_BUNDLE="$ca_bundle" CURL_CA_BUNDLE="$ca_bundle"
fi
network="see that the box reaches its package index; a \`mirror\` in boxes.yaml names another, build.CA_BUNDLE the certificates of a proxy"

# --- the two runtimes ------------------------------------------------------------------------------------------------

# Runs the conda or uv that makes a Python. It gets a home of its own, since conda records its environments in the home and uv puts
# programs there. It still gets the user's own settings, which name a provider's mirror.
make_python() { # ARG...
    config=${XDG_CONFIG_HOME:-${HOME:-/}/.config} own=$cache/home
    [ -n "${CONDARC:-}" ] || [ ! -r "${HOME:-}/.condarc" ] || export CONDARC="$HOME/.condarc"
    [ -n "${MAMBARC:-}" ] || [ ! -r "${HOME:-}/.mambarc" ] || export MAMBARC="$HOME/.mambarc"
    export CONDA_PKGS_DIRS="$cache/conda" MAMBA_ROOT_PREFIX="$cache/mamba" UV_CACHE_DIR="$cache/uv" UV_PYTHON_INSTALL_DIR="$environment/base"
    mkdir -p "$own"
    stage "Python $PYTHON, by ${maker##*/}" "$network" env HOME="$own" XDG_CONFIG_HOME="$config" XDG_DATA_HOME="$own/data" UV_PYTHON_BIN_DIR="$own/bin" "$maker" "$@"
}

# The provider's image may have the locked PyTorch: 2.3 GB need not be downloaded then.
take_torch() {
    for theirs in "$python" "/opt/conda/bin/python$PYTHON" "/root/miniconda3/bin/python$PYTHON" "/venv/main/bin/python$PYTHON" "/usr/bin/python$PYTHON"; do
        [ -x "$theirs" ] || continue
        has_torch=$("$theirs" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null) || continue
        grep -q "^torch==$has_torch\([ \\]\|$\)" "$pins/$torch.txt" || continue
        packages=$(echo "$environment"/lib/python3.*/site-packages)
        stage "PyTorch ($torch), which this box has" "$network" "$theirs" "$code/env/take_torch.py" "$pins/$torch.txt" "$packages"
        [ ! -e "$packages/torch/__init__.py" ] || return 0
    done
    return 1
}

bare() {
    # shellcheck source=env/torch_wheel.sh
    . "$code/env/torch_wheel.sh"
    mkdir -p "$environment"
    if [ -n "$maker" ]; then
        case ${maker##*/} in
            uv)
                make_python python install "$PYTHON"
                for python in "$environment"/base/*/bin/"python$PYTHON"; do break; done
                ;;
            micromamba)
                make_python create --yes --prefix "$environment/base" --channel "${CONDA_CHANNEL:-conda-forge}" "python=$PYTHON"
                python=$environment/base/bin/python$PYTHON
                ;;
            *)
                # Without a channel of the mirror, the box's own configuration is used, which providers point at their mirror.
                if [ -n "${CONDA_CHANNEL:-}" ]; then set -- --override-channels --channel "$CONDA_CHANNEL"; else set --; fi
                make_python create --yes --quiet --prefix "$environment/base" "$@" "python=$PYTHON"
                python=$environment/base/bin/python$PYTHON
                ;;
        esac
        [ -x "$python" ] || refuse "${maker##*/} made no Python $PYTHON" "install python$PYTHON and python$PYTHON-venv there" "$(tail -n 5 "$log")"
    fi
    stage "a virtual environment" "install python$PYTHON-venv there" "$python" -m venv "$environment"
    stage "pip" "$network" "$environment/bin/python" -m pip install --no-deps --require-hashes --requirement "$pins/pip.txt"
    export UV_CACHE_DIR="$cache/uv"
    if ! take_torch; then
        torch_requirement "$pins/$torch.txt" "$WHEEL" >"$environment/torch.txt"
        stage "PyTorch ($torch)" "$network" sh "$code/env/install_locked.sh" "$environment/bin/python" "$environment/torch.txt" --download-first --timeout 60 --retries 5
    fi
    # DeepSpeed is built here, with the lock's setuptools and PyTorch installed, so it comes after all others.
    sed '/^deepspeed==/,/# via/d' "$pins/$flavour.txt" >"$environment/wheels.txt"
    stage "all else that is locked" "$network" sh "$code/env/install_locked.sh" "$environment/bin/python" "$environment/wheels.txt"
    # No operators are compiled, since a box may have no nvcc: training uses PyTorch's AdamW, and looks for no accelerator.
    export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
    sed -n '/^deepspeed==/,/# via/p' "$pins/$flavour.txt" >"$environment/deepspeed.txt"
    stage "DeepSpeed" "$network" "$environment/bin/python" -m pip install --no-deps --require-hashes --no-build-isolation --requirement "$environment/deepspeed.txt"
    # shellcheck source=env/cuda.sh
    . "$code/env/cuda.sh"
    stage "self-check" "the same command makes it again" "$environment/bin/python" "$code/docker/check_image.py" "$code/env" "$flavour" "$torch" ""
    say "note $(tail -n 1 "$log")"
    rm -rf "$environment/uv"
    unset CUDA_VISIBLE_DEVICES DS_ACCELERATOR
    if [ "$device" = cuda ]; then
        cards=$("$environment/bin/python" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2>>"$log" || echo 0)
        [ "$cards" != 0 ] || say "note PyTorch sees no card here: fab doctor says what is wrong"
        [ "$cards" = 0 ] || say "note PyTorch sees $cards of the cards"
    fi
    date +%s >"$environment/complete.new"
    mv "$environment/complete.new" "$environment/complete"
}

own_docker_config() { # a copy of the user's own, since a build writes files next to it (.token_seed) that would stay in the home
    theirs=${DOCKER_CONFIG:-${HOME:-}/.docker}
    rm -rf "$cache/docker"
    mkdir -p "$cache/docker"
    for each in "$theirs"/*; do [ ! -e "$each" ] || ln -s "$each" "$cache/docker/"; done
    export DOCKER_CONFIG="$cache/docker"
}

docker_image() {
    set -- docker compose --project-directory "$code" --env-file /dev/null --file "$code/docker-compose.yml"
    [ "$device" = cuda ] || set -- "$@" --file "$code/docker/compose.cpu.yml"
    while IFS= read -r argument; do
        # shellcheck disable=SC2163 # NAME=VALUE, of names that deployment.py knows
        [ -z "$argument" ] || export "$argument"
    done <<END
$build_arguments
END
    RLHF_UID=$(id -u) RLHF_GID=$(id -g)
    export RLHF_UID RLHF_GID RLHF_TAG="$key" FLAVOUR="$flavour" MIRROR="$mirror" TORCH="$torch" ${ca_bundle:+CA_BUNDLE="$ca_bundle"}
    own_docker_config
    export BUILDX_CONFIG="$cache/buildx"
    unset COMPOSE_FILE COMPOSE_PROFILES
    stage "the image rlhf-box:$key" "$network; BASE_IMAGE and BUILD_IMAGE (build: in boxes.yaml) name other images to start from" "$@" --progress plain build train
    docker image inspect "rlhf-box:$key" >/dev/null 2>>"$log" || refuse "Docker built no image rlhf-box:$key" "see $log" "$(tail -n 5 "$log")"
    say "note the image checked itself: versions, PyTorch's CUDA, DeepSpeed's operators"
}

# --- who uses it -----------------------------------------------------------------------------------------------------

is_in_use() { # by a live job, here or on another host that shares ROOT; sets run, where, their_host
    read_line "$root/slot/environment" && [ "$value" = "$key" ] && read_line "$root/slot/run" || return 1
    run=$value job=$root/runs/$value/job request='' pid=''
    ! read_line "$root/slot/request" || request=$value
    place
    read_line "$root/slot/boot"
    sight "$value"
    if [ "$where" = here ]; then
        ! read_line "$root/slot/pid" || pid=$value
        read_line "$root/slot/start" && is_running "$pid" "$value" && return 0
        read_line "$job/process" && is_running "${value% *}" "${value#* }" # without its supervisor
    elif read_line "$job/request" && [ "$value" = "$request" ]; then
        [ ! -e "$job/exit" ] && hears "$job/heartbeat"
    else # it is about to begin
        read_line "$root/slot/claimed" && is_number "$value" && age=$(($(date +%s) - value)) && [ "${age#-}" -le $QUIET_S ]
    fi
}

mkdir -p "$root/env" "$root/cache/tmp"
if [ "$runtime" != docker ] && is_in_use; then
    if [ "$where" = here ]; then place_of_job='here' cure='wait for its end, or end it with fab cancel'; else
        place_of_job="on $their_host, which shares $root" cure='wait for its end, or give this box a data_folder of its own in boxes.yaml'
    fi
    refuse "the environment $key is in use: run \`$run\` is being trained in it, $place_of_job" "$cure" "it is not whole as seen from here, and making it again would remove it under the job"
fi
# A call that was killed (SIGKILL) could not end the processes that it had started.
if { read -r old began <"$environment.child"; } 2>/dev/null && is_running "$old" "$began"; then
    kill -KILL "-$old" 2>/dev/null || kill -KILL "$old" 2>/dev/null || true
fi
fields_of $$
{ echo "$$ $since" >"$root/lock/worker"; } 2>/dev/null || true
if ! : >"$log"; then refuse "cannot write to $root/env" "check that its disk is there and not full"; fi
keep_lock
[ "$runtime" = docker ] || rm -rf "$environment"
case $runtime in
    bare) bare ;;
    docker) docker_image ;;
    *) refuse "the runtime $runtime is not known" "see remote/on_box/environment.sh" ;;
esac
say made
