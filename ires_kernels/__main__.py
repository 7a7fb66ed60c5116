"""``python -m ires_kernels`` is the command ``ires``."""

import sys

from ires_kernels.cli import main

sys.exit(main())
