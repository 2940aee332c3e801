#!/usr/bin/env bash
# Tests, costs and CIFAR-10 on one GPU, within some minutes, without a network.
#
#   docs/gpu/run.sh --pack DIR [--cifar10 FOLDER] [--text FILE]
#       On a machine with a network and this repository's environment: makes DIR, at most 60 MiB.
#       It holds our members and what the other machine lacks as wheels, and CIFAR-10 from
#       FOLDER/train.parquet and FOLDER/test.parquet (columns image {bytes} and label), written
#       anew: compressed, its JPEG files are half as large.
#
#   docs/gpu/run.sh OUT [--packed DIR] [--minutes M] [--tiny] [--device cpu] [--jobs N]
#                   [--mps] [--archive FILE]
#       On the machine with the GPU, with a checkout of the same commit. Prints an estimate, then:
#       1. the tests marked gpu;
#       2. synchronisations per step, which must be 0; the step in its forms (foreach, fused,
#          compiled); the bench's CUDA cases;
#       3. CIFAR-10: corrections and controls, as many seeds as fit, N runs at once.
#       OUT/summary.md says what came out. A run that is cut leaves what it had. With --archive
#       FILE all of OUT is there too, as a tar.gz that is renewed every 30 seconds.
#       --mps lets the runs of 3. compute at the same time, where NVIDIA's MPS works; else they take
#       turns on the GPU.
#       --tiny --device cpu tries the whole way on small sizes; its numbers mean nothing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}

case ${1:-} in
    '' | -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        ;;
    --pack)
        shift
        exec bash "$here/pack.sh" "$@"
        ;;
    *)
        exec "$python" "$here/stages.py" "$@"
        ;;
esac
