"""Comet. Its own library takes the key from COMET_API_KEY or ~/.comet.config; it passes through no file of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.schema.run import MonitorConfig

INSTALL = "pip install -r requirements/comet.txt"


class CometSink:
    """One Comet experiment. Raises ImportError where the package is missing."""

    def __init__(self, monitor: MonitorConfig, run_name: str, config: Mapping[str, Any]) -> None:
        import comet_ml

        self._experiment = comet_ml.start(workspace=monitor.comet_workspace, project_name=monitor.comet_project)
        self._experiment.set_name(monitor.comet_experiment_name or run_name)
        self._experiment.add_tags(monitor.comet_tags or [])
        self._experiment.log_others(monitor.comet_others or {})
        self._experiment.log_parameters(dict(config))

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Record the numbers of an iteration."""
        self._experiment.log_metrics(dict(scalars), step=iteration)

    def close(self, failed: bool = False) -> None:
        """Send what is left and end the experiment, with a tag where the run failed."""
        if failed:
            self._experiment.add_tag("failed")
        self._experiment.end()
