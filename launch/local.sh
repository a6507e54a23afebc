#!/usr/bin/env bash
# Run one job on this machine with an MPS daemon around it: MPS up, torchrun, MPS down.
#
#   launch/local.sh --nproc-per-node 8 -m colospec.run +mode=colocate
#
# The words are torchrun's. A run starts a daemon by itself; this script is for several jobs in turn
# on one daemon, or for watching it (python -m colospec.mps status). PYTHON chooses the interpreter.
set -euo pipefail
python=${PYTHON:-python3}

exports=$("$python" -m colospec.mps start --owner $$)
eval "$exports"
trap '"$python" -m colospec.mps stop || true' EXIT

# In the background, so that a signal is passed on at once: torchrun then stops its ranks, which
# save a checkpoint, and the second wait sees its end.
"$python" -m torch.distributed.run --standalone "$@" &
job=$!
signalled=
trap 'signalled=143; kill -TERM "$job" || true' TERM HUP
trap 'signalled=130; kill -TERM "$job" || true' INT
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do
    code=0
    wait "$job" || code=$?
done
exit "${signalled:-$code}"
