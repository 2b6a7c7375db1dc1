"""Compiles a checkpoint to an artifact and verifies it: ``python compile.py CHECKPOINT -o OUT.onnx``.

The same as ``bitbybit compile``.
"""

import sys

from bitbybit.cli import main

if __name__ == "__main__":
    main(["compile", *sys.argv[1:]])
