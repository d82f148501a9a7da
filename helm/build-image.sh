#!/usr/bin/env bash
# helm/build-image.sh FOLDER NAME [FLAG...]: build FOLDER/Dockerfile as NAME:VERSION with buildah, podman or docker.
#
# FLAGs go to the builder as they are (--network host, --target sbom --output DIR, --build-arg MODEL=..., --no-cache).
# By environment:
#   BUILDER       buildah, podman or docker; the first of them on the PATH where it is empty
#   BASE_IMAGE    any image with Python 3.11 to 3.13 and glibc; the Dockerfile's default where it is empty
#   TOOLS_IMAGE   the image of the stage that installs tini and uv; BASE_IMAGE where it is empty
#   CA_BUNDLE     PEM file of a build network's own authorities; a build secret, in no layer of the image
#   IMAGE_TAG     NAME:VERSION where it is empty; VERSION is pyproject.toml's, which is the chart's appVersion
set -euo pipefail

folder=$1 name=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

builder=${BUILDER:-}
for candidate in buildah podman docker; do
  if [ -z "$builder" ] && command -v "$candidate" > /dev/null; then builder=$candidate; fi
done
if [ -z "$builder" ]; then
  echo "no buildah, podman or docker on the PATH (or name one by BUILDER)" >&2
  exit 69 # EX_UNAVAILABLE
fi

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2> /dev/null || echo unknown)
tag=${IMAGE_TAG:-$name:$version}
arguments=(-f "$folder/Dockerfile")
# A part of the image (--target sbom) must not take the name of the whole.
case " $* " in
  *" --target"*) tag="a part of $tag" ;;
  *) arguments+=(-t "$tag") ;;
esac
arguments+=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision")
if [ -n "${BASE_IMAGE:-}" ]; then arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE"); fi
if [ -n "${TOOLS_IMAGE:-}" ]; then arguments+=(--build-arg "TOOLS_IMAGE=$TOOLS_IMAGE"); fi
if [ -n "${CA_BUNDLE:-}" ]; then arguments+=(--secret "id=ca,src=$CA_BUNDLE"); fi
# OCI's own format has no HEALTHCHECK; docker knows no other than its own.
if [ "$builder" != docker ]; then arguments+=(--format docker --layers); fi

"$builder" build "${arguments[@]}" "$@" .
echo "built $tag"
