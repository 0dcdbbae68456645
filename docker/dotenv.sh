#!/bin/sh
# Writes .env for docker compose: who you are, and whether this machine has a GPU; makes the folders that are mounted.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."

# The container never runs as root. Root (on a rented machine, or by sudo) gets the user who called sudo, or 1000.
uid=$(id -u) gid=$(id -g)
[ "$uid" != 0 ] || { uid=${SUDO_UID:-1000} gid=${SUDO_GID:-1000}; }
[ "$uid" != 0 ] || { uid=1000 gid=1000; }

mkdir -p data runs cache secrets
chmod 700 secrets
[ "$(id -u)" != 0 ] || chown "$uid:$gid" data runs cache secrets

{
    echo "# Written by \`make .env\`; yours from now on. Remove it, and \`make .env\` writes it again."
    echo "RLHF_UID=$uid"
    echo "RLHF_GID=$gid"
    if [ ! -e /proc/driver/nvidia/version ] && [ ! -e /dev/dxg ] && ! command -v nvidia-smi >/dev/null; then # dxg: the GPU of WSL
        echo "# No NVIDIA driver was found: the image for the CPU."
        echo "COMPOSE_FILE=docker-compose.yml:docker/compose.cpu.yml"
    fi
} >.env.new
if [ "$(id -u)" = 0 ]; then # the file is that user's, who must be able to read a checkout with a strict umask, too
    chown "$uid:$gid" .env.new
    chmod -R a+rX jobs data
fi
mv .env.new .env
cat .env
if [ -e /proc/driver/nvidia/version ] && ! command -v nvidia-container-runtime-hook >/dev/null && ! command -v nvidia-ctk >/dev/null; then
    echo "warning: this machine has a GPU, and no NVIDIA Container Toolkit, without which Docker cannot give it to a container:" \
        "install the package nvidia-container-toolkit, and restart Docker" >&2
fi
