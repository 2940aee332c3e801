"""`python -m regrad_runner`, and with it `torchrun -m regrad_runner` and `accelerate launch -m regrad_runner`."""

import sys

from regrad_runner.cli.main import main

sys.exit(main())
