"""python -m lowrank_ds."""

import sys

from lowrank_ds.cli import main

sys.exit(main())
