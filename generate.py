#!/usr/bin/env python3
"""Make text with a trained model: `./deepy.py generate.py configs/a.yml -i prompts.txt -o samples.jsonl`."""

import sys

from megatron.launch.prelude import prepare

if __name__ == "__main__":
    prepare(__file__)
    from megatron.generation.run import run_generation
    from megatron.launch.entry import run_worker

    sys.exit(run_worker(lambda config, mesh, _: run_generation(config, mesh), sys.argv[1:], decoding=True))
