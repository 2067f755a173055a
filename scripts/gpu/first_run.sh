#!/usr/bin/env bash
# The first run on a GPU: parity of every kernel, times, training steps, embedding, and a model that is trained.
#
#   scripts/gpu/first_run.sh [--out DIR] [--device DEVICE] [--dataset DIR] [--tiny]
#
# Takes at most ten minutes and needs no network. Every part writes DIR/PART.json and DIR/PART.log, is bounded in time,
# and keeps what it has when it is stopped. `--device cpu --tiny` is a dry run of all parts.
set -u
cd "$(dirname "$0")/../.."
out=${OUT:-gpu_first_run}
options=()
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift 2 ;;
    --device|--dataset) options+=("$1" "$2"); shift 2 ;;
    --tiny) options+=("$1"); shift ;;
    *) echo "error: $1: expected --out, --device, --dataset or --tiny" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
worst=0
part() {
  # A part begins nothing new after so many seconds, is interrupted 15 seconds later, and killed 10 seconds after that.
  timeout --signal=INT --kill-after=10 "$(($2 + 15))" "${PYTHON:-python}" scripts/gpu/part.py "$1" \
    --out "$out/$1.json" --seconds "$2" "${options[@]+"${options[@]}"}" >"$out/$1.log" 2>&1
  status=$?
  echo "$1: status $status"
  [ "$status" -gt "$worst" ] && worst=$status
}
part parity 140
part times 90
part steps 80
part embed 65
part model 80
exit "$worst"
