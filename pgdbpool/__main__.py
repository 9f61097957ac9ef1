"""`python -m pgdbpool` is the command `pgdbpool`."""

import sys

from ._cli.main import main

sys.exit(main())
