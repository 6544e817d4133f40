"""The meeting of all ranks before anything is built: who is there, who is missing, and who differs.

Each rank leaves a card in the store of the run: its host, device, versions and a hash of its config. All of them read
all cards, so all of them see the same problem, and it names every rank that has it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from megatron import logs
from megatron.config.schema.config import Config
from megatron.errors import LaunchError, Problem
from megatron.launch.hang import ranges
from megatron.launch.hosts import HOSTS_VARIABLE, parse_hosts
from megatron.launch.interface import address_towards, why_unreachable
from megatron.launch.place import Place
from megatron.launch.slurm import ranks_to_hosts
from megatron.ops.cpu.library import make_ready

QUIET_SECONDS = 3.0
"""How long a rank waits for the others before it says so."""
READ_SECONDS = 10.0
_SHOWN_KEYS = 6
_SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h", ".json")
_SSH_PORT = 22
logger = logs.get_logger(__name__)


@dataclass(frozen=True)
class Card:
    """What a rank says of itself.

    address: by which it reaches MASTER_ADDR. device: its name; kind: cpu or cuda. The rest must be alike on all ranks;
    code: a hash of this library's files. kernels: whether those in C++ are there on a CPU. PyTorch's, which serve where
    they are not, round differently, and what every rank should hold alike would drift apart.
    """

    host: str
    address: str
    device: str
    kind: str
    world_size: int
    python: str
    torch: str
    cuda: str
    deepspeed: str
    code: str
    kernels: str
    config: str


ALIKE = {
    "kind": "kind of device",
    "python": "Python",
    "torch": "torch",
    "cuda": "CUDA and NCCL",
    "deepspeed": "deepspeed",
    "code": "this library (hash of its files)",
    "kernels": "the library of C++ kernels",
    "config": "config (hash)",
}
"""Field -> what a person calls it."""


def write_card(place: Place, config: Config, device: torch.device, name: str) -> Card:
    """Return this rank's card. name: the device's, for people."""
    return Card(
        host=place.host,
        address=address_towards(place.master_addr, place.master_port),
        device=name,
        kind=device.type,
        world_size=place.world_size,
        python=".".join(platform.python_version_tuple()[:2]),
        torch=torch.__version__,
        cuda=_cuda() if device.type == "cuda" else "none",
        deepspeed=importlib.metadata.version("deepspeed"),
        code=hash_of_code(),
        kernels=_cpu_kernels(device),
        config=hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12],
    )


def _cpu_kernels(device: torch.device) -> str:
    if device.type != "cpu":
        return "not used"
    return "missing" if make_ready(device) else "there"


def _cuda() -> str:
    return f"{torch.version.cuda}, {'.'.join(map(str, torch.cuda.nccl.version()))}"


@cache
def hash_of_code() -> str:
    """Return a hash of this library's sources, and of the measurements that choose kernels: names and contents."""
    root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in _SOURCES):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def expected_hosts(world_size: int, environ: Mapping[str, str]) -> list[str]:
    """Return the host of each rank as Slurm or our launcher's hostfile tells it; empty where nothing does."""
    hosts = ranks_to_hosts(environ)
    if not hosts and environ.get(HOSTS_VARIABLE):
        hosts = [host.name.rpartition("@")[2] for host in parse_hosts(environ[HOSTS_VARIABLE]) for _ in host.slots]
    return hosts if len(hosts) == world_size else []


def count_local(store: dist.Store, place: Place, seconds: float, expected: Sequence[str]) -> Place:
    """Return the place with its local rank and size, which the ranks count by the names of their hosts.

    Raises LaunchError as `check_in` does."""
    if place.is_local_known:
        return place
    return place.beside(_gather(store, place, "host", place.host, seconds, expected))


def check_in(
    store: dist.Store, place: Place, config: Config, card: Card, seconds: float, expected: Sequence[str] = ()
) -> list[Card]:
    """Meet all ranks; return their cards. Rank 0 prints who they are.

    seconds: how long to wait for the last rank. expected: the host of each rank, where it is known.
    Raises LaunchError naming the ranks that did not come, that are there twice, or that differ.
    """
    texts = _gather(store, place, "card", json.dumps(dataclasses.asdict(card)), seconds, expected)
    cards = [Card(**json.loads(text)) for text in texts]
    problems = differences(cards)
    if card.config != cards[0].config:
        _leave_changes(store, place, config)
    if place.rank == 0:
        store.set("deepy/config", config.model_dump_json())
    problems += [_with_changes(store, problem, cards) for problem in _config_problem(cards)]
    _let_all_read(store, place)
    if problems:
        raise LaunchError(*problems)
    _introduce(cards)
    return cards


def _introduce(cards: Sequence[Card]) -> None:
    hosts, devices = sorted({card.host for card in cards}), Counter(card.device for card in cards)
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    kinds = "; ".join(name if len(devices) == 1 else f"{count} x {name}" for name, count in devices.items())
    logger.info(f"{len(cards)} processes on {len(hosts)} host{'s'[: len(hosts) > 1]} ({shown}): {kinds}")


def _gather(
    store: dist.Store, place: Place, what: str, value: str, seconds: float, expected: Sequence[str]
) -> list[str]:
    """Return every rank's value, in the order of ranks. Raises LaunchError for ranks that are missing or doubled."""
    if store.add(f"deepy/{what}s/{place.rank}", 1) > 1:
        raise _doubled(store, place, what)
    store.set(f"deepy/host of/{place.rank}", place.host)
    store.set(f"deepy/{what}/{place.rank}", f"{place.world_size} {value}")
    begin, is_told, present = time.monotonic(), place.rank > 0, set[int]()
    keys = [f"deepy/{what}/{rank}" for rank in range(place.world_size)]
    while True:
        present |= {rank for rank, key in enumerate(keys) if rank not in present and store.check([key])}
        if len(present) == place.world_size:
            words = [store.get(key).decode().partition(" ") for key in keys]
            _require_one_size(store, [int(word[0]) for word in words])
            return [word[2] for word in words]
        missing, waited = set(range(place.world_size)) - present, time.monotonic() - begin
        if waited > seconds:
            raise _missing(store, place, missing, present, seconds, expected)
        if waited > QUIET_SECONDS and not is_told:
            is_told = True
            tell_waiting(_with_hosts(missing, expected), place)
        time.sleep(0.02)


def tell_waiting(ranks: str, place: Place) -> None:
    """Say whom this rank waits for: rank 0 in a line, the others in a warning."""
    say = logger.info if place.rank == 0 else logger.warning
    say(f"waiting for {ranks} of {place.world_size} at {place.master_addr}:{place.master_port}")


def _missing(
    store: dist.Store, place: Place, missing: set[int], present: set[int], seconds: float, expected: Sequence[str]
) -> LaunchError:
    known = sorted({store.get(f"deepy/host of/{rank}").decode() for rank in present})
    silent = sorted({expected[rank] for rank in missing} - set(known)) if expected else []
    found = [f"{host}: {_whether_it_answers(host)}." for host in silent[:4]]
    return LaunchError(
        Problem(
            f"{_with_hosts(missing, expected)} of {place.world_size}",
            f"did not come within {seconds:.0f} s; the others are on {', '.join(known)}."
            + "".join(f" {sentence}" for sentence in found),
            "Look at the output of the missing ranks: one that says it found no rank 0 has started, and cannot reach "
            f"MASTER_ADDR:MASTER_PORT = {place.master_addr}:{place.master_port}; one without any output has not "
            "started.",
        )
    )


def _whether_it_answers(host: str) -> str:
    why = why_unreachable(host, _SSH_PORT)
    if not why or "nobody listens" in why:
        return "the machine answers, so its ranks have not started, or cannot reach rank 0's port"
    return why


def _doubled(store: dist.Store, place: Place, what: str) -> LaunchError:
    other = store.get(f"deepy/host of/{place.rank}").decode()
    return LaunchError(
        Problem(
            f"rank {place.rank}",
            f"is there twice: on {other} and on {place.host}.",
            "Give every process a RANK of its own (in containers: the pod's index); or another run uses the same "
            "MASTER_PORT.",
        )
    )


def _require_one_size(store: dist.Store, sizes: Sequence[int]) -> None:
    odd = {rank for rank, size in enumerate(sizes) if size != sizes[0]}
    if odd:
        values = ", ".join(map(str, sorted({sizes[rank] for rank in odd})))
        why = f"but rank 0 has {sizes[0]}."
        raise LaunchError(
            Problem(f"the number of processes is {values} for {ranges(odd)}", why, "Start all with one WORLD_SIZE.")
        )


def differences(cards: Sequence[Card]) -> list[Problem]:
    """Return a problem for each fact but the config in which ranks differ, with all ranks of the fewer kind."""
    fixes = dict.fromkeys(ALIKE, "Start all ranks from the same installation with the same files.")
    fixes["kernels"] = "`./deepy.py doctor` says there what stands in the way: most often a C++ compiler is lacking."
    return [_difference(field, cards, fixes[field]) for field in ALIKE if field != "config" and _differ(field, cards)]


def _config_problem(cards: Sequence[Card]) -> list[Problem]:
    fix = "Give all ranks the same config files and overrides."
    return [_difference("config", cards, fix)] if _differ("config", cards) else []


def _differ(field: str, cards: Sequence[Card]) -> bool:
    return len({getattr(card, field) for card in cards}) > 1


def _difference(field: str, cards: Sequence[Card], fix: str) -> Problem:
    value_of: Callable[[Card], str] = lambda card: str(getattr(card, field))  # noqa: E731
    most = Counter(map(value_of, cards)).most_common(1)[0][0]
    hosts = [card.host for card in cards]
    groups = []
    for value in sorted({value_of(card) for card in cards} - {most}):
        odd = {rank for rank, card in enumerate(cards) if value_of(card) == value}
        groups.append(f"{value} for {_with_hosts(odd, hosts)}")
    same = {rank for rank, card in enumerate(cards) if value_of(card) == most}
    return Problem(f"{ALIKE[field]} is {'; '.join(groups)}", f"but {most} for {_with_hosts(same, hosts)}.", fix)


def _leave_changes(store: dist.Store, place: Place, config: Config) -> None:
    """Tell the others in which keys this rank's config differs from rank 0's."""
    first = json.loads(store.get("deepy/config"))
    own = json.loads(config.model_dump_json())
    changes = [
        f"{key} = {own[section].get(key)} (rank 0: {first[section].get(key)})"
        for section in own
        for key in (own[section] if isinstance(own[section], dict) else ())
        if own[section].get(key) != first.get(section, {}).get(key)
    ]
    store.set(f"deepy/changes/{place.rank}", "; ".join(changes[:_SHOWN_KEYS]))


def _with_changes(store: dist.Store, problem: Problem, cards: Sequence[Card]) -> Problem:
    """Return the problem with the keys in which the first differing rank's config is another than rank 0's."""
    odd = next(rank for rank, card in enumerate(cards) if card.config != cards[0].config)
    return dataclasses.replace(
        problem, why=f"{problem.why} Rank {odd} has {store.get(f'deepy/changes/{odd}').decode()}."
    )


def _let_all_read(store: dist.Store, place: Place) -> None:
    """Keep rank 0, which holds the store, until the others have read the cards, so that all see the same problem."""
    read, deadline = store.add("deepy/read", 1), time.monotonic() + READ_SECONDS
    while place.rank == 0 and read < place.world_size and time.monotonic() < deadline:
        time.sleep(0.01)
        read = store.add("deepy/read", 0)


def _with_hosts(ranks: set[int], hosts: Sequence[str]) -> str:
    """Return ranks with the hosts that they are on, where these are known: `ranks 2-3 (n2)`."""
    names = sorted({hosts[rank] for rank in ranks}) if hosts else []
    return ranges(ranks) + (f" ({', '.join(names)})" if names else "")
