#!/usr/bin/env bash
# The image of serving/Dockerfile; what can be set is in helm/build-image.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/../helm/build-image.sh" serving mien-serve "$@"
