#!/usr/bin/env python3
"""The launcher: `./deepy.py train.py configs/125M.yml configs/local_setup.yml`; `./deepy.py --help` says more."""

import sys

from megatron.launch.prelude import prepare

if __name__ == "__main__":
    prepare(__file__)
    from megatron.launch.cli import main

    sys.exit(main(sys.argv[1:]))
