"""Ray Tune on a small machine: how many trials fit at once, one line per report, and clean-up after stopped trials."""

import time

import ray
from ray import tune
from ray.train import ScalingConfig

from helpers import _ray_internals, cluster, settings

# The function that builds a trial's trainer only waits for it; a trial's data tasks need a CPU that works.
DRIVER_CPUS, DATA_CPUS = 0.1, 1


class TuningError(RuntimeError):
    """A trial failed or never ran; the message says which and why."""


class PrintReports(tune.Callback):
    """Prints a line when a trial starts and one for each of its `epochs`, in the notebook, instead of Tune's tables."""

    def __init__(self, epochs: int):
        self.epochs = epochs
        self.start = time.monotonic()

    def setup(self, **_):
        """Start the clock when the search starts."""
        self.start = time.monotonic()

    def on_trial_start(self, trial, **_):
        """Print what a trial tries: its first report takes a while."""
        values = "  ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in trial.config.items())
        self._print(trial, f"starts: {values}")

    def on_trial_result(self, trial, result, **_):
        """Print what a trial reported after an epoch."""
        epoch = f"epoch {result['training_iteration']}/{self.epochs}"
        self._print(trial, f"{epoch}  validation accuracy {result['validation_accuracy']:.3f}")

    def on_trial_complete(self, trial, **_):
        """Print whether a trial reached its last epoch or was stopped by the scheduler."""
        complete = trial.last_result.get("training_iteration", self.epochs) >= self.epochs
        self._print(trial, "finished" if complete else "stopped")

    def on_trial_error(self, trial, **_):
        """Print that a trial failed."""
        self._print(trial, "FAILED")

    def _print(self, trial, text: str):
        number = int(trial.trial_id.rsplit("_", 1)[-1]) + 1  # counted from 1, in the order of creation
        print(f"{time.monotonic() - self.start:4.0f} s  trial {number}  {text}")


class ReleaseStoppedTrials(tune.Callback):
    """Frees the CPUs or GPUs of stopped trials, so that the next one can start."""

    last = 0.0

    def on_step_begin(self, **_):
        """Look for them once a second; Tune calls this far more often."""
        if time.monotonic() - self.last > 1:
            self.last = time.monotonic()
            _ray_internals.remove_orphaned_placement_groups()


def plan_trials(trials: int, cfg: settings.Settings | None = None, seconds: float = 10) -> tuple[ScalingConfig, int]:
    """Return the workers of one trial, and how many trials may run at once; ClusterError if not one can."""
    cfg = cfg or settings.load()
    cluster.require_shared_storage(cfg.storage)
    workers, most = cfg.workers or 1, trials  # one: workers communicate with each other, trials do not
    if ray.cluster_resources().get("GPU", 0):
        scaling = ScalingConfig(num_workers=workers, use_gpu=True)
    elif cluster.on_one_machine():
        # Two trials on two cores, one core each; more only where each still has two, since each takes memory, too.
        most = max(1, min(trials, max(2, min(4, cluster.cores() // 2)) // workers))
        cpus = max(1, cluster.cores() // (most * workers))
        scaling = ScalingConfig(num_workers=workers, resources_per_worker={"CPU": cpus})
    else:
        scaling = ScalingConfig(num_workers=workers)
    needs = dict(scaling.total_resources)
    needs["CPU"] = needs.get("CPU", 0) + DRIVER_CPUS + DATA_CPUS
    return scaling, min(most, cluster.count_free(needs, "One trial, its data tasks included, needs", seconds))


def require_success(results: tune.ResultGrid, trials: int) -> None:
    """Raise TuningError when a trial failed or never ran, and KeyboardInterrupt when the learner stopped the search."""
    for result in results:
        if result.error:
            reason = (str(result.error).strip().splitlines() or [repr(result.error)])[-1]
            cause = result.error if isinstance(result.error, BaseException) else None  # Tune may keep its text alone
            raise TuningError(f"The trial with {result.config} failed: {reason}") from cause
    if not all((result.metrics or {}).get("done") for result in results):
        raise KeyboardInterrupt("the search was stopped; run the cell again to start a new one")
    reported = [result for result in results if result.metrics and "validation_accuracy" in result.metrics]
    if len(reported) != trials:
        raise TuningError(f"Only {len(reported)} of {trials} trials reported: see the lines above.")


def discard_losers(results: tune.ResultGrid, best: tune.Result) -> None:
    """Delete the checkpoints of all trials but `best`; their metrics stay."""
    for result in results:
        if result.metrics["trial_id"] != best.metrics["trial_id"]:
            results.filesystem.delete_dir(f"{results.experiment_path}/train-{result.metrics['trial_id']}")
