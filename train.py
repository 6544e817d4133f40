#!/usr/bin/env python3
"""Train a model: `./deepy.py train.py configs/a.yml`, or the same without `./deepy.py` under torchrun or python."""

import sys

from megatron.launch.prelude import prepare

if __name__ == "__main__":
    prepare(__file__, stoppable=True)
    from megatron.launch.entry import run_worker
    from megatron.training.run import train

    sys.exit(run_worker(train, sys.argv[1:]))
