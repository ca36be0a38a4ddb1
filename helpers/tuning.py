"""What a search with Ray Tune prints and keeps, and whether all its trials have succeeded."""

import time

from ray import tune

from helpers import _ray_internals


class TuningError(RuntimeError):
    """A trial failed or never ran; the message says which and why."""


class PrintReports(tune.Callback):
    """Prints a line for each trial that ends, instead of Tune's tables; keeps all `reports` in the order they came.

    A report is a dict of `trial` (counted from 1), `epoch` (counted from 1) and the validation `accuracy`, 0 to 1.
    """

    def __init__(self, epochs: int):
        self.epochs, self.reports = epochs, []
        self.start = self.freed = time.monotonic()

    def on_step_begin(self, **_):
        """Free the CPUs or GPUs of stopped trials once a second, so that the next can start; Tune calls this often."""
        if time.monotonic() - self.freed > 1:
            self.freed = time.monotonic()
            _ray_internals.remove_orphaned_placement_groups()

    def on_trial_result(self, trial, result, **_):
        """Keep what a trial reported; Tune calls this in the order in which the scheduler has seen the reports."""
        report = {"trial": _number(trial), "epoch": result["training_iteration"]}
        self.reports.append({**report, "accuracy": result["validation_accuracy"]})

    def on_trial_complete(self, trial, **_):
        """Print whether a trial reached its last epoch or was stopped by the scheduler."""
        last = trial.last_result
        complete = last.get("training_iteration", self.epochs) >= self.epochs
        how = "finished" if complete else f"stopped after epoch {last['training_iteration']}"
        self._print(trial, f"{how:<22} accuracy {last.get('validation_accuracy', 0):.3f}")

    def on_trial_error(self, trial, **_):
        """Print that a trial failed."""
        self._print(trial, "FAILED")

    def _print(self, trial, text: str):
        config = trial.config.get("entry", trial.config)
        numbers = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in config.items()}
        values = "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in numbers.items())
        print(f"{time.monotonic() - self.start:4.0f} s  trial {_number(trial):>2}  {text}  ({values})")


def _number(trial) -> int:
    return int(trial.trial_id.rsplit("_", 1)[-1]) + 1  # in the order of creation


def require_success(results: tune.ResultGrid, trials: int, epochs: int) -> None:
    """Raise TuningError when a trial failed or never ran, KeyboardInterrupt when one was cut off before `epochs`."""
    for result in results:
        if result.error:
            reason = (str(result.error).strip().splitlines() or [repr(result.error)])[-1]
            cause = result.error if isinstance(result.error, BaseException) else None  # Tune may keep its text alone
            raise TuningError(f"The trial with {result.config} failed: {reason}") from cause
    cut = [(result.metrics or {}).get("training_iteration", 0) for result in results if not _has_ended(result, epochs)]
    if cut:
        raise KeyboardInterrupt(f"the search was stopped after {cut} of {epochs} epochs; run it again for a new one")
    reported = sum("validation_accuracy" in (result.metrics or {}) for result in results)
    if reported != trials:
        raise TuningError(f"Only {reported} of {trials} trials reported: see the lines above.")


def _has_ended(result, epochs: int) -> bool:
    # The state of a search that was killed may lack the last "done" or epoch of a trial, which the trial's file has.
    rows = [] if result.metrics_dataframe is None else result.metrics_dataframe.to_dict("records")
    return any(row.get("done") or row.get("training_iteration", 0) >= epochs for row in [*rows, result.metrics or {}])
