"""``python -m pra``, for launchers that start modules."""

import sys

from pra.cli import main

sys.exit(main())
