"""One readable progress display for `trainer.fit()`, in place of Ray's logs."""

import contextlib
import contextvars
import json
import signal
import threading
import time
import uuid

import pyarrow.fs
from ray.train import UserCallback


class ReportWriter(UserCallback):
    """Writes each report as a small JSON file into the run's folder; runs in Ray Train's controller process."""

    def after_report(self, run_context, metrics, checkpoint):
        """Write rank 0's metrics as `<storage_path>/<name>/reports/<n>.json`."""
        run = run_context.run_config
        filesystem, path = reports_folder(run)
        filesystem.create_dir(path)
        name = f"{path}/{time.time():.3f}.json"
        with filesystem.open_output_stream(name) as stream:
            stream.write(json.dumps(metrics[0]).encode())


def reports_folder(run_config) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem and path of the folder that `ReportWriter` writes to."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(run_config.storage_path)
    return filesystem, f"{path}/{run_config.name}/reports"


@contextlib.contextmanager
def shown(trainer):
    """Show `trainer`'s epochs as they are reported, and the seconds that go by; needs a `ReportWriter` in its run.

    Gives an object whose `seconds` are those that each epoch took, process start included in the first.

    Raises:
        KeyboardInterrupt: the reader interrupted the cell; the run is given up.
    """
    from helpers import cluster  # not above: Ray Train's controller imports this module and does without

    display = _Display(trainer)
    previous = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    try:
        yield display
    except SystemExit:  # what `fit()` makes of an interrupt
        raise KeyboardInterrupt("training was stopped; run the cell again, and a new run begins") from None
    else:
        cluster.replace_used(display.workers)
    finally:
        display.stop()
        if previous is not None:
            signal.signal(signal.SIGINT, previous)  # `fit()` leaves its own handler behind


def _in_a_notebook() -> bool:
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


class _Display:
    """A thread that looks at the reports twice a second and rewrites one block of text."""

    def __init__(self, trainer):
        self.run = trainer.run_config
        self.workers = trainer.scaling_config.num_workers
        self.epochs = trainer.train_loop_config["num_epochs"]
        self.start = time.monotonic()
        self.lines = []
        self.seconds = []
        self.seen = set()
        self.last = time.time()
        self.handle = uuid.uuid4().hex if _in_a_notebook() else None
        self.shown_first = False
        self.done = threading.Event()
        self._draw("starting the worker processes")
        context = contextvars.copy_context()  # the thread writes into the cell that started it
        self.thread = threading.Thread(target=context.run, args=(self._watch,), daemon=True)
        self.thread.start()

    def stop(self):
        self.done.set()
        self.thread.join()
        self._look()
        self._draw(None)

    def _watch(self):
        while not self.done.wait(0.5):
            with contextlib.suppress(OSError, ValueError):  # just being written: the next look, or the last, reads it
                self._look()
            waiting = f"epoch {len(self.lines) + 1}/{self.epochs} runs" if self.lines else "starting, then epoch 1"
            self._draw(waiting if len(self.lines) < self.epochs else "finishing")

    def _look(self):
        filesystem, path = reports_folder(self.run)
        selector = pyarrow.fs.FileSelector(path, allow_not_found=True)
        for file in sorted(filesystem.get_file_info(selector), key=lambda info: info.path):
            if file.path in self.seen or not file.size:
                continue
            with filesystem.open_input_stream(file.path) as stream:
                metrics = json.loads(stream.read())
            self.seen.add(file.path)
            now = float(file.base_name.removesuffix(".json"))  # when it was reported, not when it was seen
            values = "   ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in metrics.items() if isinstance(v, float))
            took = f"{now - self.last:.0f} s" if now > self.last else "before"  # by a driver that died
            self.lines.append(f"epoch {metrics.get('epoch', len(self.lines)) + 1}/{self.epochs}   {values}   {took}")
            if now > self.last:
                self.seconds.append(now - self.last)
                self.last = now
            if self.handle is None:
                print(self.lines[-1])

    def _draw(self, waiting):
        if self.handle is None:
            return
        from IPython.display import publish_display_data

        seconds = time.monotonic() - self.start
        last = f"{waiting} … {seconds:.0f} s" if waiting else f"fit() took {seconds:.0f} s in all"
        text = "\n".join([f"{self.run.name} · workers: {self.workers}", *self.lines, last])
        publish_display_data(
            {"text/plain": text},
            transient={"display_id": self.handle},
            update=self.shown_first,
        )
        self.shown_first = True
