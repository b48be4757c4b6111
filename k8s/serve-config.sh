#!/bin/sh
# Writes OVERLAY/serve-config.yaml, the RayService's serveConfigV2, from OVERLAY/shoal.yaml: what `shoal config` prints, as a patch.
#
#   k8s/serve-config.sh k8s/overlays/gpu ...
#
# SHOAL  the command [shoal]
set -eu

for overlay in "$@"; do
    settings=$overlay/shoal.yaml
    model=$(sed -n '/^model:/,/^[^ ]/s/^  path: *//p' "$settings")
    patch=$overlay/serve-config.yaml
    {
        printf '%s\n' "# Made by k8s/serve-config.sh from shoal.yaml: change that, and run it again." \
            'apiVersion: ray.io/v1' 'kind: RayService' 'metadata:' '  name: shoal' 'spec:' '  serveConfigV2: |'
        ${SHOAL:-shoal} config "$model" --config "$settings" | sed 's/^/    /'
    } >"$patch.new"
    mv "$patch.new" "$patch"
done
