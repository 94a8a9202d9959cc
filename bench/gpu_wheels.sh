#!/usr/bin/env bash
# bench/gpu_wheels.sh FOLDER: download what gpu_wheels.txt names, for CPython 3.12 on x86-64 Linux, into FOLDER.
# Fails if it is more than LIMIT_MIB (default: 60) or if a wheel lacks.
set -euo pipefail
list=$(dirname "$0")/gpu_wheels.txt
limit=${LIMIT_MIB:-60}
python=${PYTHON:-python}
if [ $# -ne 1 ]; then
    echo "error: one argument was needed, the folder to download into, got $#" >&2
    exit 2
fi
mkdir -p "$1"
platforms=()
# pip matches each name exactly
for name in manylinux2014 manylinux_2_17 manylinux_2_24 manylinux_2_26 manylinux_2_27 manylinux_2_28 manylinux_2_34; do
    platforms+=(--platform "${name}_x86_64")
done
"$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version 3.12 "${platforms[@]}" \
    -d "$1" -r "$list"
bytes=$(cat "$1"/*.whl | wc -c)
ls -l "$1" | awk '/\.whl$/ { printf "%8.2f MiB  %s\n", $5 / 1048576, $NF }' | sort -rn
printf '%8.2f MiB  in all, at most %s\n' "$(awk "BEGIN { print $bytes / 1048576 }")" "$limit"
if [ "$bytes" -gt $((limit * 1048576)) ]; then
    echo "error: the wheels are larger than $limit MiB" >&2
    exit 1
fi
