#!/bin/sh
# Installs what a lock names into the virtual environment of PYTHON:
#
#     sh env/install_locked.sh PYTHON LOCK [--download-first] [ARGUMENT of pip...]
#
# uv does it in a fraction of pip's time. It comes from the package index as all else does, by hash, and stays in VENV/uv, which the
# caller removes at the end. Where uv cannot be had, or fails, pip does the same. For uv the index and the certificates are read from
# pip's files and variables, since providers and proxies set those.
#
# --download-first: pip downloads, which shows bytes (`Progress 1000 of 2000`) and resumes a broken download; for PyTorch.
set -eu
python=$1 lock=$2
shift 2
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
venv=$(CDPATH='' cd -- "$(dirname -- "$python")/.." && pwd -P)
uv=$venv/uv/bin/uv
downloads=''
if [ "${1:-}" = --download-first ]; then downloads=$venv/downloads && shift; fi

said_by_pip() { # NAME: its value in pip's variables, or else in its files
    for place in :env: install global; do
        value=$(printf '%s\n' "$settings" | sed -n "s/^$place\.$1='\(.*\)'\$/\1/p" | sed 's/\\n/ /g')
        [ -z "$value" ] || break
    done
    printf '%s' "$value"
}

by_uv() { # ARGUMENT...
    [ -e "$venv/uv" ] || "$python" -m pip install --quiet --no-deps --require-hashes --retries 1 --timeout 30 \
        --target "$venv/uv" --requirement "$here/pins/uv.txt" || return 1
    [ -x "$uv" ] || return 1
    settings=$("$python" -m pip config list) || return 1
    index=$(said_by_pip index-url) more=$(said_by_pip extra-index-url) links=$(said_by_pip find-links)
    trusted=$(said_by_pip trusted-host) certificates=$(said_by_pip cert) proxy=$(said_by_pip proxy)
    export UV_INDEX_STRATEGY=unsafe-best-match UV_HTTP_TIMEOUT=60 ${index:+UV_DEFAULT_INDEX="$index"} ${more:+UV_INDEX="$more"}
    export ${links:+UV_FIND_LINKS="$links"} ${trusted:+UV_INSECURE_HOST="$trusted"} ${certificates:+SSL_CERT_FILE="$certificates"}
    export ${proxy:+HTTPS_PROXY="$proxy"} ${proxy:+HTTP_PROXY="$proxy"}
    # As pip does. Where Python may write no bytecode (PYTHONDONTWRITEBYTECODE), every process would compile all that it imports.
    "$uv" pip install --python "$python" --no-deps --compile-bytecode "$@"
}

install() { # ARGUMENT...: by uv, else by pip
    by_uv "$@" || {
        echo "uv could not install it; pip does"
        "$python" -m pip install --no-deps "$@"
    }
}

if [ -n "$downloads" ]; then
    rm -rf "$downloads"
    # An older pip knows no `raw`, and downloads without a word.
    if "$python" -m pip download --help | grep -qw raw; then set -- --progress-bar raw "$@"; fi
    "$python" -m pip download --no-deps --require-hashes --dest "$downloads" "$@" --requirement "$lock"
    # pip would download them again all the same, so uv keeps no second copy of these gigabytes.
    export UV_NO_CACHE=1 UV_LINK_MODE=hardlink
    install "$downloads"/*.whl
    rm -rf "$downloads"
else
    install --require-hashes --requirement "$lock"
fi
