"""`t2i-align train` as a module, for launchers: `torchrun --nproc_per_node 2 -m t2i_align.train CONFIG key=value`."""

import sys

from t2i_align.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
