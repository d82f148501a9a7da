#!/usr/bin/env bash
# The image of training/Dockerfile; what can be set is in helm/build-image.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/../helm/build-image.sh" training mien-train "$@"
