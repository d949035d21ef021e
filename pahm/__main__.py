"""`python -m pahm` runs the command `pahm`."""

import sys

from pahm.cli import main

sys.exit(main())
