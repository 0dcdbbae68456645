# shellcheck shell=sh
# Sourced by docker/install.sh and remote/on_box/environment.sh, which install the same locks: how PyTorch's line becomes what pip is asked for.

torch_requirement() { # LOCK WHEEL (of the flavour); a version such as 2.0.1+cu118 is a file of PyTorch's own index, or of a mirror of its files; else as it stands
    wheel=$(sed -n 's#^torch==\([0-9.]*\)+\([a-z0-9]*\) \(.*\)#torch @ '"$PYTORCH_WHEELS"'/\2/torch-\1%2B\2-'"$2"'.whl \3#p' "$1")
    if [ -n "$wheel" ]; then printf '%s\n' "$wheel"; else cat "$1"; fi
}
