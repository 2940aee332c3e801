#!/usr/bin/env bash
# Makes the folder that travels to a machine without a network: see run.sh --help.
# Usage: docs/gpu/pack.sh DIR [--cifar10 FOLDER] [--text FILE]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${1:?give the folder to make}
shift
cifar10=data/cifar10
text=
while (($#)); do
    case $1 in
        --cifar10) cifar10=${2:?give the folder with train.parquet and test.parquet} ;;
        --text) text=${2:?give the text file} ;;
        *)
            echo "pack.sh: no such option: $1" >&2
            exit 2
            ;;
    esac
    shift 2
done

# What the runner, the bench and the tests import, and the other machine lacks. Their own needs are
# there or in this list.
MISSING=(
    annotated-doc annotated-types docstring-parser filelock msgpack pydantic pydantic-core
    pytorch-optimizer safetensors shellingham timm typer typing-extensions typing-inspection
)

mkdir -p "$folder/data"
rm -rf "$folder/wheels"
cd "$root"
uv build --quiet --all-packages --wheel --out-dir "$folder/wheels"
uv build --quiet --wheel --out-dir "$folder/wheels" docs/gpu/on_device
rm -f "$folder/wheels/.gitignore"
wanted=$(uv run --no-sync python - "${MISSING[@]}" <<'PYTHON'
import sys
from importlib.metadata import version

sys.stdout.write(" ".join(f"{name}=={version(name)}" for name in sys.argv[1:]))
PYTHON
)
# shellcheck disable=SC2086  # one word for each distribution
python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder/wheels" \
    --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 $wanted

uv run --no-sync python "$here/part_of_images.py" "$cifar10" "$folder/data"
if [[ -n $text ]]; then
    cp "$text" "$folder/data/"
fi
git rev-parse HEAD >"$folder/commit"
size=$(du -sm "$folder" | cut -f1)
echo "$folder: $size MiB"
if ((size > 60)); then
    echo "pack.sh: DIR must be at most 60 MiB, got $size" >&2
    exit 1
fi
