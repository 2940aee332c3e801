"""`python -m regrad_runner`, and so `torchrun` or `accelerate launch` with `-m regrad_runner`."""

import sys

from regrad_runner.cli.main import main

sys.exit(main())
