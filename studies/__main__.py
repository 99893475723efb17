"""``python -m studies NAME``, in the root of a clone."""

import sys

from studies.command import main

sys.exit(main())
