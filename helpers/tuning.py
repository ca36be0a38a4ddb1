"""A search over hyperparameters with Ray Tune: what a trial is, and as many of them at once as fit."""

import itertools
import time
from dataclasses import replace

import ray
import ray.data
from ray import tune
from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from helpers import cluster, settings
from helpers.sharding import KeepEveryRow
from helpers.trainer import build_datasets, build_train_loop_config
from helpers.training import train_loop_ray_train_ray_data

# The function that builds a trial's trainer only waits for it; the tasks that read for a trial need a CPU that works.
DRIVER_CPUS, DATA_CPUS = 0.1, 1
TUNABLE = ("learning_rate", "batch_size")


class TuningError(RuntimeError):
    """The search space can't be searched, or a trial failed; the message says which and why."""


def run_trial(
    hyperparameters: dict,
    train_ds: ray.data.Dataset,
    validation_ds: ray.data.Dataset,
    class_names: list[str],
    statistics: tuple[list[float], list[float]],
    scaling_config: ScalingConfig,
    folder: str,
    chosen: settings.Settings,
) -> None:
    """Train once with `hyperparameters` in place of those in `chosen`; Tune runs this in a process of its own."""
    trial = replace(chosen, **hyperparameters)
    workers = scaling_config.num_workers
    trainer = TorchTrainer(
        train_loop_ray_train_ray_data,
        train_loop_config=build_train_loop_config(train_ds, class_names, workers, trial, statistics),
        scaling_config=scaling_config,
        run_config=RunConfig(
            storage_path=folder,
            name=f"train-{tune.get_context().get_trial_id()}",
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[TuneReportCallback()],
        ),
        datasets=build_datasets(train_ds, validation_ds, flip=chosen.flips),
        dataset_config=KeepEveryRow(),
    )
    trainer.fit()


def build_tuner(space: dict[str, list], at_once: int, name: str, chosen: settings.Settings, **given) -> tune.Tuner:
    """Return the search over every combination in `space`, judged after each epoch on the validation pictures.

    Args:
        space: the values to try by hyperparameter.
        at_once: how many trials may run at a time.
        name: the search's folder below `tuning`, never used before.
        chosen: the settings that all trials share, among them `epochs`.
        given: what `run_trial` is given besides: the datasets, their class names and channel statistics, and the
            scaling of a trial.
    """
    driver = tune.with_parameters(run_trial, folder=chosen.path("tuning", name), chosen=chosen, **given)
    return tune.Tuner(
        tune.with_resources(driver, {"CPU": DRIVER_CPUS}),
        param_space={parameter: tune.grid_search(values) for parameter, values in space.items()},
        tune_config=tune.TuneConfig(
            metric="test_accuracy",
            mode="max",
            scheduler=ASHAScheduler(grace_period=1, reduction_factor=2, max_t=chosen.epochs, stop_last_trials=False),
            max_concurrent_trials=at_once,
        ),
        run_config=tune.RunConfig(
            storage_path=chosen.path("tuning"),
            name=name,
            verbose=0,
            progress_reporter=tune.CLIReporter(),
            callbacks=[PrintReports(chosen.epochs), ReleaseStoppedTrials()],
            failure_config=tune.FailureConfig(fail_fast=True),
        ),
    )


class PrintReports(tune.Callback):
    """Prints a line when a trial starts and for each of its epochs, in place of Tune's tables.

    Runs in the notebook's process.

    Args:
        epochs: how many a trial makes unless it is stopped.
    """

    def __init__(self, epochs: int):
        self.epochs = epochs
        self.start = time.monotonic()

    def setup(self, **_):
        """Start the clock when the search starts."""
        self.start = time.monotonic()

    def on_trial_start(self, trial, **_):
        """Say what a trial tries: its first report takes a while."""
        chosen = "  ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in trial.config.items())
        self._print(trial, f"starts: {chosen}")

    def on_trial_result(self, trial, result, **_):
        """Print what a trial reported after an epoch."""
        done, accuracy = result["training_iteration"], result["test_accuracy"]
        self._print(trial, f"epoch {done}/{self.epochs}  validation accuracy {accuracy:.3f}")

    def on_trial_complete(self, trial, **_):
        """Say whether a trial came to its last epoch or was stopped by the scheduler."""
        whole = trial.last_result.get("training_iteration", self.epochs) >= self.epochs
        self._print(trial, "finished" if whole else "stopped")

    def on_trial_error(self, trial, **_):
        """Say that a trial failed."""
        self._print(trial, "FAILED")

    def _print(self, trial, text: str):
        print(f"{time.monotonic() - self.start:4.0f} s  trial {number_of(trial.trial_id)}  {text}")


class ReleaseStoppedTrials(tune.Callback):
    """Gives back the CPUs or GPUs of stopped trials, so that the next one can start."""

    def __init__(self):
        self.looked = 0.0

    def on_step_begin(self, **_):
        """Look for them once a second; Tune calls this many times as often."""
        if time.monotonic() - self.looked > 1:
            self.looked = time.monotonic()
            cluster.remove_orphaned_placement_groups()


def number_of(trial_id: str) -> int:
    """The trial's number, counted from 1 in the order in which trials were made."""
    return int(trial_id.rsplit("_", 1)[-1]) + 1


def plan_trials(trials: int, chosen: settings.Settings | None = None, seconds: float = 10) -> tuple[ScalingConfig, int]:
    """Return the workers of one trial, and how many trials may run at once on what Ray has.

    A trial has one worker unless the reader chose more: trials beside each other have nothing to say to each other,
    workers do. On one machine without GPUs the cores are shared out among the trials.

    Args:
        trials: how many there are in all.
        chosen: the settings; read now when not given.
        seconds: how long to wait for resources that exist but are in use.

    Raises:
        ClusterError: there is no room for a single trial, or others occupy it.
    """
    chosen = chosen or settings.load()
    cluster.require_shared(chosen.storage)
    workers = chosen.workers or 1
    most = trials
    if ray.cluster_resources().get("GPU", 0):
        scaling = ScalingConfig(num_workers=workers, use_gpu=True)
    elif cluster.on_one_machine():
        # Two trials on two cores, one core each; more only where each still has two, since each takes memory, too.
        most = max(1, min(trials, max(2, min(4, cluster.cores() // 2)) // workers))
        scaling = ScalingConfig(
            num_workers=workers, resources_per_worker={"CPU": max(1, cluster.cores() // (most * workers))}
        )
    else:
        scaling = ScalingConfig(num_workers=workers)

    needs = {name: amount for name, amount in scaling.total_resources.items() if amount}
    needs["CPU"] = needs.get("CPU", 0) + DRIVER_CPUS + DATA_CPUS

    total = ray.cluster_resources()
    for resource, amount in needs.items():
        if amount > total.get(resource, 0):
            raise cluster.ClusterError(
                f"One trial needs {amount:g} {resource}, with the tasks that read its pictures, and this Ray has "
                f"{total.get(resource, 0):g}: set TUTORIAL_WORKERS to a smaller number, or start Ray with more."
            )
    deadline = time.monotonic() + seconds
    while True:
        cluster.remove_orphaned_placement_groups()
        free = ray.available_resources()
        fit = {name: int(free.get(name, 0) / amount) for name, amount in needs.items()}
        scarce = min(fit, key=fit.get)
        if fit[scarce]:
            return scaling, min(most, fit[scarce])
        if time.monotonic() > deadline:
            raise cluster.ClusterError(
                f"One trial needs {needs[scarce]:g} {scarce}, and only {free.get(scarce, 0):g} are free: let the other "
                "lesson finish or shut down its kernel."
            )
        time.sleep(0.5)


def two_batch_sizes(chosen: settings.Settings, pictures: int, workers: int) -> list[int]:
    """Return a half and a quarter of the chosen batch size, each shared evenly by `workers`.

    A search trains on few pictures; in large batches they would make few steps. With very few pictures the sizes are
    smaller still, and only one where two would be the same.
    """
    whole = max(workers, min(chosen.batch_size // 2, pictures // 4) // workers * workers)
    half = max(workers, whole // 2 // workers * workers)
    return sorted({whole, half}, reverse=True)


def check_space(space: dict[str, list], pictures: int, workers: int, chosen: settings.Settings) -> int:
    """Return how many trials `space` makes, after a look at each of them.

    Args:
        space: the values to try by hyperparameter.
        pictures: how many there are to train on.
        workers: how many share a batch.
        chosen: the settings that the trials share.

    Raises:
        TuningError: a hyperparameter is unknown or has no values, or a value can't be used.
    """
    unknown = sorted(set(space) - set(TUNABLE))
    if unknown:
        raise TuningError(f"The search space has {unknown[0]!r}; what can be tuned here: {', '.join(TUNABLE)}.")
    for name in space or TUNABLE:
        if not isinstance(space.get(name), list) or not space[name]:
            raise TuningError(f"The search space needs a list of values to try for {name}.")
    combinations = list(itertools.product(*space.values()))
    for values in combinations:
        trial = replace(chosen, **dict(zip(space, values, strict=True)))
        rate, batch = trial.learning_rate, trial.batch_size
        if not isinstance(rate, int | float) or not 0 < rate <= 10:
            raise TuningError(f"A learning rate of {rate!r} can't be tried: use a number above 0, at most 10.")
        if not isinstance(batch, int) or batch < workers or batch % workers:
            raise TuningError(
                f"A batch of {batch!r} pictures can't be shared evenly by the workers, {workers} a trial."
            )
        if batch // workers > pictures // workers:
            raise TuningError(f"{pictures} pictures to train on do not fill one batch of {batch}: try smaller ones.")
    return len(combinations)


def require_success(results: tune.ResultGrid, trials: int) -> None:
    """Raise when a trial failed, never ran or was interrupted: Tune itself returns what is left of the search.

    Raises:
        KeyboardInterrupt: the reader interrupted the search.
        TuningError: names the first trial that failed and its error.
    """
    for result in results:
        if result.error:
            reason = (str(result.error).strip().splitlines() or [repr(result.error)])[-1]
            cause = result.error if isinstance(result.error, BaseException) else None  # Tune may keep its text alone
            raise TuningError(f"The trial with {result.config} failed: {reason}") from cause
    if not all((result.metrics or {}).get("done") for result in results):
        raise KeyboardInterrupt("the search was stopped; run the cell again, and a new one begins")
    whole = [result for result in results if result.metrics and "test_accuracy" in result.metrics]
    if len(whole) != trials:
        raise TuningError(f"Only {len(whole)} of {trials} trials reported: see the lines above.")


def discard_losers(results: tune.ResultGrid, best: tune.Result) -> None:
    """Delete the checkpoints of all trials but `best`; their metrics stay."""
    filesystem = results.filesystem
    for result in results:
        if result.metrics["trial_id"] != best.metrics["trial_id"]:
            filesystem.delete_dir(f"{results.experiment_path}/train-{result.metrics['trial_id']}")
