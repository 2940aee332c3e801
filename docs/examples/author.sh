#!/usr/bin/env bash
# From an empty folder to a published-quality plugin: what `nox -s author` runs, and docs/authors.md shows.
set -euo pipefail

# A distribution of your own, with a small example. It works before you have edited anything.
regrad plugins new my-method --author "Your Name"
uv pip install --editable regrad-my-method
regrad plugins show my-method
regrad plugins check my-method

# The rule, first as its source states it (float64, loops): divide by the square of an element's size instead.
sed -i.bak 's|g / (1 + abs(g) / bound)|g / (1 + (abs(g) / bound) ** 2)|' regrad-my-method/tests/reference.py
if regrad plugins check my-method > before.txt; then
    echo "the check should have seen that the fast version is not the reference's" >&2
    exit 1
fi
grep -E "reference +FAILED" before.txt

# Then the fast version.
sed -i.bak 's|1 + gradient.abs() / self.options.bound|1 + (gradient.abs() / self.options.bound).square()|' regrad-my-method/src/regrad_my_method/__init__.py
regrad plugins check my-method

# What you would publish: a wheel and a source distribution.
uv build regrad-my-method --out-dir dist

# Does it help? On real data, with paired seeds; six seeds are the fewest for a verdict, two are for a look.
regrad compare --corrections my-method --seeds 2 --epochs 2 --threads 1 --out comparison
regrad plugins doctor
