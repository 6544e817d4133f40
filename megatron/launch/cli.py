"""`./deepy.py`: from the words a person types to a run, its check, its command line, or a report on the machine."""

from __future__ import annotations

import os
import runpy
import secrets
import shlex
import signal
import sys
from pathlib import Path

from megatron.config.schema.config import Config
from megatron.config.schema.run import LauncherConfig
from megatron.config.transport import pack
from megatron.errors import DeepyError, LaunchError, Problem
from megatron.launch import check, doctor, node, parity, plan
from megatron.launch.arguments import Arguments, build_parser, parse_arguments
from megatron.launch.command import Layout, local_environments, single_layout
from megatron.launch.decoding import decoding_processes
from megatron.launch.devices import torch_has_cuda, visible_gpus
from megatron.launch.hosts import require_reachable
from megatron.launch.port import hold_port
from megatron.launch.prelude import PAYLOAD_FLAG
from megatron.launch.read_config import read_launcher, read_layout, read_settings, resolve_for
from megatron.launch.relay import run_remote
from megatron.launch.remote import remote_command, unsent_secrets
from megatron.launch.show import show_local, show_remote
from megatron.launch.supervise import run_ranks

# Scripts that need no more processes than hold the model, all on this machine, whatever layout the config trains with.
DECODING = frozenset({"generate.py"})
_HOME = Path(__file__).resolve().parents[2]  # where deepy.py and the scripts lie
USAGE = """\
./deepy.py SCRIPT [-d DIR] CONFIG [CONFIG ...] [--set KEY=VALUE ...] [--check | --print]
./deepy.py plan CONFIG [CONFIG ...] [--gpus N] [--gpu-memory GIB] [--search]
./deepy.py parity [-d DIR] CONFIG [CONFIG ...] [--set KEY=VALUE ...]
./deepy.py doctor

  ./deepy.py train.py configs/quickstart.yml                     train on this machine, on its GPUs or its CPU
  ./deepy.py train.py -d configs 125M local_setup                several files are merged; .yml may be left out
  ./deepy.py train.py configs/125M.yml --set train_iters=100     any key can be set on the command line
  ./deepy.py train.py configs/125M.yml --check                   is the config sound? needs no GPU and no torch
  ./deepy.py train.py configs/125M.yml --print                   what would run, in a form to copy
  ./deepy.py generate.py configs/quickstart.yml -i prompts.txt   text from a checkpoint
  ./deepy.py plan configs/20B.yml --gpus 96 --gpu-memory 40      does it fit, how long does it take, what is better
  ./deepy.py parity configs/20B.yml                              does its layout train as one process does?
  ./deepy.py doctor                                              what this machine has

"""


def main(argv: list[str]) -> int:
    """Do what the command line asks; return the exit code: 0, 2 for a mistake of the user, or the failed rank's."""
    try:
        if not argv:
            print(f"Which script, and which configs?\n\n{USAGE}", file=sys.stderr, end="")
            return 2
        if argv[0] in ("-h", "--help", "help"):
            print(USAGE + build_parser("./deepy.py SCRIPT").format_help(), end="")
            return 0
        if argv[0] == "doctor":
            return doctor.main(argv[1:])
        if argv[0] == "plan":
            return plan.main(argv[1:])
        if argv[0] == "node":
            return node.main(argv[1:])
        if argv[0] == "parity":
            return parity.main(argv[1:])
        script = _find_script(argv[0])
        return _run(script, parse_arguments(argv[1:], f"./deepy.py {argv[0]}"))
    except DeepyError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has seen enough, as in `./deepy.py plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _find_script(name: str) -> str:
    """Return the script to run, of this folder or else of deepy.py's own. Raises LaunchError where there is none."""
    for candidate in (name, f"{name}.py", str(_HOME / name), str(_HOME / f"{name}.py")):
        if Path(candidate).is_file() and candidate.endswith(".py"):
            return candidate
    if Path(name).suffix in (".yml", ".yaml", ".json"):
        why, fix = "is a config; the script comes first.", f"Write: ./deepy.py train.py {name}"
    else:
        why = "is no script here." if not Path(name).exists() else "is not a Python script."
        scripts = {path.name for folder in (Path(), _HOME) for path in folder.glob("*.py")} - {"deepy.py"}
        fix = f"The scripts are: {', '.join(sorted(scripts))}."
    error = LaunchError(Problem(name, why, fix))
    error.exit_code = 2
    raise error


def _run(script: str, arguments: Arguments) -> int:
    """Check, print or start a script with its configs."""
    if arguments.check:
        return check.run_check(arguments.config_files, arguments.config_dir, arguments.overrides)
    settings = read_settings(arguments)
    launcher = read_launcher(settings)
    if Path(script).name in DECODING:
        config = resolve_for(settings, None, planning=True)
        layout = _decoding_layout(config)
    else:
        layout = read_layout(settings, launcher, os.environ)
        config = resolve_for(settings, layout.world_size)
    payload = pack(config, settings.texts())
    if layout.is_remote:
        return _run_remote(script, arguments, layout, launcher, payload)
    if arguments.show:
        print(show_local(script, arguments, layout, local_environments(layout, launcher, os.environ)))
        return 0
    if not layout.gpus and _has_unused_gpus():
        print(
            "[warning] This machine has a GPU, but torch was built without CUDA: running on the CPU.", file=sys.stderr
        )
    with hold_port(launcher.master_port) as held:
        environments = local_environments(layout, launcher, os.environ, held)
        minutes = None if Path(script).name in DECODING else launcher.hang_timeout_minutes
        hang_seconds = None if minutes is None else 60 * minutes
        return run_ranks(lambda local_rank: _run_script(script, payload), environments, hang_seconds=hang_seconds)


def _decoding_layout(config: Config) -> Layout:
    """Return the processes that share the model, as many as this machine has GPUs for; on the CPU all of them."""
    gpus, trained = len(visible_gpus(os.environ)), config.parallel
    wanted = decoding_processes(config, sys.maxsize)
    count = decoding_processes(config, gpus or wanted)
    if count < wanted:
        print(
            f"[note] model_parallel_size = {trained.model_parallel_size} x pipe_parallel_size = "
            f"{max(1, trained.pipe_parallel_size)} would share the model over {wanted} GPUs, and this machine shows "
            f"{gpus}: {count} hold{'s'[: count == 1]} it.",
            file=sys.stderr,
        )
    return single_layout(os.environ, count)


def _has_unused_gpus() -> bool:
    return not torch_has_cuda() and any(Path("/dev").glob("nvidia[0-9]*"))


def _run_script(script: str, payload: str) -> int:
    """In a rank's process: run the script as if it had been started by itself, with the config as its argument."""
    sys.argv = [script, PAYLOAD_FLAG, payload]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
    return 0


def _run_remote(script: str, arguments: Arguments, layout: Layout, launcher: LauncherConfig, payload: str) -> int:
    """Print or run the command that starts the ranks on several hosts; return its exit code."""
    run = secrets.token_hex(6)
    command = remote_command(layout.hosts, launcher, script, payload, os.environ, run)
    if arguments.show:
        print(show_remote(command, layout.hosts, launcher, f"{shlex.quote(script)} {arguments.command_line()}"))
        return 0
    require_reachable(layout.hosts, launcher.launcher, not launcher.no_ssh_check)
    unsent = unsent_secrets(launcher, os.environ)
    if unsent:
        print(
            f"[warning] {', '.join(unsent)} are not sent to other hosts, because every user there could read them on a "
            "command line. Set them in the environment of the other hosts' shells; for Weights & Biases run "
            "`wandb login` once on the first host instead.",
            file=sys.stderr,
        )
    return run_remote(command, launcher.launcher, layout.hosts, run)
