#!/bin/sh
# Fetch the published checkpoints and the example data: guided_diffusion/downloads does it.
CDPATH='' cd -- "$(dirname -- "$0")" || exit 1
for package in gdown sys; do # rather a Python that has gdown
  for python in .venv/bin/python python3 python; do
    "$python" -c "import sys, $package; sys.exit(sys.version_info < (3, 10))" 2>/dev/null || continue
    exec "$python" -m guided_diffusion.downloads "$@"
  done
done
echo "download.sh: needs Python 3.10 or newer; README.md says how to install everything" >&2
exit 1
