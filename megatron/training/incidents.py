"""What a run does about a step that was left out: examine it, record it, go back, or end.

    for every read of results:  progress = incidents.handle(progress, results)

Every rank calls it with the same results, so all do the same. Numbers decide, which all ranks have alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megatron.data.prefetch import Steps
from megatron.engine.base import Engine
from megatron.engine.examination import Examination
from megatron.errors import EngineError, Problem
from megatron.logs import get_logger
from megatron.monitor.build import Monitor
from megatron.training.guards import Guards, GuardState, Incident, LeftOut
from megatron.training.persistence import Keeper
from megatron.training.progress import Progress
from megatron.training.results import Results
from megatron.training.step_report import write_report
from megatron.whereabouts import Phase, inside

logger = get_logger(__name__)

MOST_REPORTS = 5
"""Steps that one process examines and reports: those behind them are only counted."""


@dataclass
class Incidents:
    """Acts on what `Results` found. save: saves now, and says where; called before a spike ends the run."""

    guards: Guards
    engine: Engine
    loader: Steps
    keeper: Keeper
    monitor: Monitor
    save: Callable[[Progress], None]
    _reports: int = field(default=0, init=False)

    def handle(self, progress: Progress, results: Results) -> Progress:
        """Act on all that was found since the last call, and return where the run goes on.

        Raises EngineError where it does not go on.
        """
        for incident in results.take_incidents():
            self._record(incident)
            if incident.kind == "not finite":
                self.report(incident, progress.iteration - incident.iteration)
                self._end_if_too_many(incident)
                continue
            if self._action == "stop":
                self._stop(progress, results, incident)
            if self._action == "rollback":
                back = self._go_back(progress, results, incident)
                if back is not None:
                    return back
            self._end_if_too_many(incident)
        return progress

    def report(self, incident: Incident, later_updates: int = 0) -> None:
        """Examine a step that is not finite, and write down what is found; every rank calls it."""
        if self._reports >= MOST_REPORTS:
            return
        self._reports += 1
        with inside(Phase.EXAMINATION):
            batches = self.loader.read_step(incident.begin)
            examination = self.engine.examine(batches, incident.iteration - 1)
        if self.monitor.folder is None:
            return
        try:
            samples = self.loader.describe_step(incident.begin)
            path = write_report(self.monitor.folder, incident, examination, samples, later_updates)
        except OSError as error:
            logger.warning("iteration %d: %s. Its report could not be written: %s", incident.iteration, incident, error)
            return
        last = " (the last report of this process)" if self._reports == MOST_REPORTS else ""
        where = _where(examination)
        logger.warning("iteration %d: %s. %s. See %s%s", incident.iteration, incident, where, path, last)

    @property
    def _action(self) -> str:
        return self.guards.spikes.action if self.guards.spikes is not None else "skip"

    def _record(self, incident: Incident) -> None:
        result = incident.result
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "samples": [incident.begin, incident.end]}
        if incident.kind == "spike":
            logger.warning("iteration %d: a spike: %s; its update is left out", incident.iteration, incident)
            values |= {"loss_limit": incident.limits.loss, "grad_norm_limit": incident.limits.grad_norm}
        self.monitor.log_incident(incident.kind.replace(" ", "_"), incident.iteration, **values)

    def _end_if_too_many(self, incident: Incident) -> None:
        if incident.kind == "not finite" and 0 < self.guards.most_not_finite < incident.in_a_row:
            raise EngineError(
                Problem(
                    what=f"most_not_finite = {self.guards.most_not_finite}",
                    why=f"{incident.in_a_row} steps in a row, the last of them {incident.iteration}, have a loss or a "
                    "gradient that is not finite. Nothing was changed by them.",
                    fix="See the reports in the run's folder, not_finite/*.json. Where a weight is not finite, go on "
                    "from an earlier checkpoint (iteration: N); where it is an activation or a gradient, go on with a "
                    "smaller learning rate, or with precision: bf16 instead of fp16.",
                )
            )
        rule = self.guards.spikes
        if incident.kind == "spike" and rule is not None and incident.in_a_row > rule.most_in_a_row:
            raise EngineError(
                Problem(
                    what=f"spike_guard.most_in_a_row = {rule.most_in_a_row}",
                    why=f"{incident.in_a_row} steps in a row, the last of them {incident.iteration}, are spikes "
                    f"({incident}): they have come to stay.",
                    fix="Go on from an earlier checkpoint (iteration: N) with a smaller learning rate; if the data "
                    "changed and this loss is right, with a larger spike_guard.loss_deviations.",
                )
            )

    def _stop(self, progress: Progress, results: Results, incident: Incident) -> None:
        """Save, with the spike's update left out, and end the run."""
        progress = results.finish(progress)
        for later in results.take_incidents():
            self._record(later)
        self.save(progress)
        raise EngineError(
            Problem(
                what="spike_guard.action = stop",
                why=f"iteration {incident.iteration} is a spike: {incident}. Its update was left out, and samples "
                f"{incident.begin} to {incident.end - 1} with it.",
                fix="Go on with resume: auto, which begins behind these samples, or from an earlier checkpoint with a "
                "smaller learning rate.",
            )
        )

    def _go_back(self, progress: Progress, results: Results, incident: Incident) -> Progress | None:
        """Return to the last checkpoint, behind the samples of the spike; None, and nothing is changed, where there is
        none yet."""
        back = self.keeper.go_back(self.engine)
        if back is None:
            logger.warning("iteration %d: there is no checkpoint yet to go back to", incident.iteration)
            return None
        results.drop()
        guard = rolled_back(progress.guard, back, incident)
        most = self.guards.spikes.most_in_a_row if self.guards.spikes is not None else 0
        if guard.rollbacks_to(back.iteration) > most:
            raise EngineError(
                Problem(
                    what=f"spike_guard.most_in_a_row = {most}",
                    why=f"the run went back to the checkpoint of iteration {back.iteration} {most} times, and comes to "
                    f"a spike again, at iteration {incident.iteration}: {incident}.",
                    fix="Go on from an earlier checkpoint (iteration: N), or with a smaller learning rate.",
                )
            )
        self.loader.seek(incident.end)
        skipped = guard.left_out[-1]
        self.monitor.log_rollback(incident.iteration, back.iteration, [skipped.begin, skipped.end])
        logger.warning(
            "going back from iteration %d to the checkpoint of iteration %d; samples %d to %d are left out",
            *(incident.iteration, back.iteration, skipped.begin, skipped.end - 1),
        )
        return replace(back, consumed_samples=incident.end, owes_validation=False, guard=guard)


def rolled_back(guard: GuardState, back: Progress, incident: Incident) -> GuardState:
    """Return what the guards know behind a rollback: what they knew at the checkpoint, and the samples left out.

    guard: at the spike. back: of the checkpoint. What was left out since it lies within the samples left out now."""
    before = back.guard.left_out
    earlier = tuple(each for each in guard.left_out[len(before) :] if each.back_to == back.iteration)
    begin = earlier[-1].end if earlier else back.consumed_samples
    now = LeftOut(incident.iteration, begin, incident.end, "rollback", back.iteration)
    return replace(back.guard, left_out=(*before, *earlier, now))


def _where(examination: Examination) -> str:
    if examination.cause is None:
        return "Done again it was finite, so a weight that changed since, or the device, is to blame"
    return f"It begins in {examination.cause}"
