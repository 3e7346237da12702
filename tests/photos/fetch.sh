#!/usr/bin/env bash
# Puts the photos of Debian packages into .photos/, without root and without installing anything.
set -euo pipefail
cd "$(dirname "$0")/../.."
packages=(lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 opencv-doc)
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
	echo "apt-get and dpkg-deb are needed to fetch the labelled photos (tests/photos/README.md)" >&2
	exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! (cd "$work" && apt-get -qq download "${packages[@]}" 2>/dev/null); then
	# No list of packages yet on this machine: one of our own.
	mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
	own=(-o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=)
	apt-get -qq "${own[@]}" update
	(cd "$work" && apt-get -qq "${own[@]}" download "${packages[@]}")
fi
for package in "$work"/*.deb; do
	dpkg-deb -x "$package" "$work/unpacked"
done
rm -rf .photos
mv "$work/unpacked" .photos
