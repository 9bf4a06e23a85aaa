"""`python -m ensemerge.cli`, for where no script is installed."""

import sys

from ensemerge.cli import main

sys.exit(main())
