"""`python -m xrk` is the command `xrk`."""

import sys

from xrk.cli import main

sys.exit(main())
