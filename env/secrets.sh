# shellcheck shell=sh
# Secrets become variables of this process and its children, for the image and for a bare box alike; sourced. The caller sets
# `secrets`, a folder, and defines `refuse WHAT HINT`, which ends.
#
# A file becomes the variable that it is named after (HF_TOKEN); ca_bundle.pem is for a TLS-intercepting proxy.
# They are in no argument, no env file and no `docker inspect`. An absent or empty folder is fine.
# shellcheck disable=SC2154
if [ -d "$secrets" ]; then
    [ -r "$secrets" ] && [ -x "$secrets" ] || refuse "the folder of secrets cannot be read by uid $(id -u)" "on the host: sudo chown -R $(id -u):$(id -g) ${RLHF_HOST_SECRETS:-secrets}"
    for file in "$secrets"/*; do
        name=${file##*/}
        case $name in
            '*' | README*) continue ;;
            ca_bundle.pem) export SSL_CERT_FILE="$file" REQUESTS_CA_BUNDLE="$file" CURL_CA_BUNDLE="$file" && continue ;;
            [!A-Z]* | *[!A-Z0-9_]*) refuse "the secret \`$name\` does not name a variable" "name the file like HF_TOKEN; one value a file" ;;
        esac
        [ -f "$file" ] || refuse "the secret \`$name\` is not a file" "put the value in a file of that name"
        [ -r "$file" ] || refuse "the secret \`$name\` cannot be read by uid $(id -u)" "on the host: sudo chown $(id -u):$(id -g) ${RLHF_HOST_SECRETS:-secrets}/$name"
        value=$(cat "$file")
        export "$name=$value"
    done
    unset file name value
fi
