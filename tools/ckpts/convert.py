#!/usr/bin/env python
"""Convert weights between a checkpoint and a Hugging Face folder; both models are run and compared each time.

python tools/ckpts/convert.py export checkpoints/pile hf/my-model
python tools/ckpts/convert.py import pythia-160m checkpoints/pythia-160m
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # this folder must not be searched for modules: it holds one called inspect
    sys.path[0] = __file__.rsplit("tools", 1)[0] or "."

import argparse
from collections.abc import Sequence

from megatron.errors import DeepyError
from megatron.interop.convert import export_hf, import_hf


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, or 2 with the problems on stderr."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "export":
            export_hf(options.checkpoint, options.out, options.iteration, options.precision, options.overwrite)
            _say_export(options.out)
        else:
            import_hf(options.model, options.out)
            _say_import(options.out)
    except DeepyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="tools/ckpts/convert.py"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="checkpoint -> Hugging Face folder, loaded and compared")
    export.add_argument("checkpoint", help="the save folder of a run (its newest checkpoint), or one global_step<N>")
    export.add_argument("out", help="the new folder; it appears only if the logits agree")
    export.add_argument("--iteration", type=int, help="step of the checkpoint; default: the newest")
    export.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        help="of the written weights, from the fp32 masters where there are any; default: as they were trained",
    )
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export once the new is proved")
    back = commands.add_parser("import", help="Hugging Face folder -> checkpoint of step 0, compared")
    back.add_argument("model", help="a folder with config.json and model.safetensors (gpt_neox, llama or gpt2)")
    back.add_argument("out", help="the new checkpoint folder; it appears only if the logits agree")
    return parser


def _say_export(out: str) -> None:
    print(f"\n{out} is ready; its README.md has the comparison. Try it:")
    print(f"  from transformers import pipeline; print(pipeline('text-generation', '{out}')('Hello'))")


def _say_import(out: str) -> None:
    print(f"\n{out} is ready. Generate with it, or fine-tune it with your own data and optimizer keys:")
    print(f"  ./deepy.py generate.py {out}/model.yml")
    print(f"  ./deepy.py train.py {out}/model.yml your_data.yml")


if __name__ == "__main__":
    sys.exit(main())
