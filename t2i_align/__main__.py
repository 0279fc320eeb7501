"""`python -m t2i_align` is the `t2i-align` command."""

import sys

from t2i_align.cli import main

sys.exit(main())
