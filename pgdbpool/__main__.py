"""`python -m pgdbpool` is the command `pgdbpool`."""

import sys

from .cli import main

sys.exit(main())
