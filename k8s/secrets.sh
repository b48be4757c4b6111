#!/bin/sh
# Prints the Secrets that the overlays name, with values drawn at random, and on stderr the API key that goes with them:
#
#   k8s/secrets.sh | kubectl -n shoal create -f -
#
# Once: with other values running pods lose Redis, each other and their clients. Your own secret store may hold the same four instead.
# More keys, scopes and limits: `shoal keys new NAME --file keys.yaml`, and the file as keys.yaml of shoal-api-keys.
set -eu

draw() { openssl rand -hex 32; }
secret() {
    printf '%s\n' '---' 'apiVersion: v1' 'kind: Secret' 'metadata:' "  name: $1" 'stringData:' "  $2"
}

key=shoal-$(draw)
hash=$(printf %s "$key" | openssl dgst -sha256 | sed 's/.*= *//')
secret shoal-redis "password: '$(draw)'"
secret shoal-secret "secret: '$(draw)'"
secret shoal-ray-token "auth_token: '$(draw)'"
secret shoal-api-keys 'keys.yaml: |'
printf '    %s\n' 'keys:' '- id: first' "  sha256: $hash" '  scopes: [inference, operator]'
echo "the API key (inference and operator), shown only now: $key" >&2
