"""Submits checkpoints and artifacts: ``python publish.py --team-name TEAM --key KEY``.

The same as ``bitbybit publish``.
"""

import sys

from bitbybit.cli import main

if __name__ == "__main__":
    main(["publish", *sys.argv[1:]])
