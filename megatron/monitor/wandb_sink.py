"""Weights & Biases. Its own library takes the key from WANDB_API_KEY or ~/.netrc; it passes through no file of ours.

`WANDB_MODE=offline` works without a network; `wandb sync` sends the run later."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from megatron.config.schema.run import MonitorConfig

INSTALL = "pip install -r requirements/wandb.txt"
_HOST = "https://api.wandb.ai"


def is_wanted(monitor: MonitorConfig) -> bool:
    """Return whether numbers go to Weights & Biases: use_wandb, and where that is unset, whether there is a key for it
    or WANDB_MODE asks for it."""
    if monitor.use_wandb is not None:
        return monitor.use_wandb
    mode = os.environ.get("WANDB_MODE")
    return mode != "disabled" and bool(mode or os.environ.get("WANDB_API_KEY") or _has_login(monitor.wandb_host))


def _has_login(server: str | None) -> bool:
    """Return whether ~/.netrc (or NETRC) knows the server."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(str(path)).authenticators(urlparse(server or _HOST).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbSink:
    """One run of Weights & Biases, continued under the same id when training resumes in the same folder.

    run_name: used where wandb_run_name is not set. folder: the run's own folder. config: what is shown with the run.
    Raises ImportError where the package is missing.
    """

    def __init__(self, monitor: MonitorConfig, run_name: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=monitor.wandb_project,
            entity=monitor.wandb_team,
            group=monitor.wandb_group,
            name=monitor.wandb_run_name or run_name,
            id=_run_id(folder),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(base_url=monitor.wandb_host or _HOST, silent=True, console="off"),
        )

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Record the numbers of an iteration."""
        self._run.log(dict(scalars), step=iteration)

    def close(self, failed: bool = False) -> None:
        """Send what is left and end the run, which its page shows as failed or finished."""
        self._run.finish(exit_code=int(failed))


def _run_id(folder: Path) -> str:
    """Return the id of this folder's run, made at the first start."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(os.urandom(4).hex())
    return path.read_text().strip()
