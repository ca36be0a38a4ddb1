"""One readable progress display for `trainer.fit()`, in place of Ray's logs."""

import contextlib
import contextvars
import json
import signal
import threading
import time

import pyarrow.fs
from ray.train import UserCallback


class ReportWriter(UserCallback):
    """Writes each report as a small JSON file into the run's folder; runs in Ray Train's controller process."""

    def after_report(self, run_context, metrics, checkpoint):
        """Write rank 0's metrics as `<storage_path>/<name>/reports/<time in seconds>.json`."""
        filesystem, path = reports_folder(run_context.run_config)
        filesystem.create_dir(path)
        with filesystem.open_output_stream(f"{path}/{time.time():.3f}.json") as stream:
            stream.write(json.dumps(metrics[0]).encode())


def reports_folder(run_config) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem and path of the folder that `ReportWriter` writes to."""
    filesystem, path = pyarrow.fs.FileSystem.from_uri(run_config.storage_path)
    return filesystem, f"{path}/{run_config.name}/reports"


@contextlib.contextmanager
def show_progress(trainer):
    """Show one line per epoch while `trainer.fit()` runs, given a `ReportWriter`; keep each epoch's `seconds`."""
    display = _Display(trainer)
    previous = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    try:
        yield display
    except SystemExit:  # what `fit()` makes of an interrupt
        what = "training was stopped; for a new run, run the lesson again from the cell that builds the trainer"
        raise KeyboardInterrupt(what) from None
    finally:
        display.stop()
        if previous is not None:
            signal.signal(signal.SIGINT, previous)  # `fit()` leaves its own handler behind


class _Display:
    """A thread that reads the reports twice a second and rewrites one block of text."""

    def __init__(self, trainer):
        from IPython import get_ipython  # Ray Train's controller imports this module and does without
        from IPython.display import Pretty, display  # `Pretty` shows a text without quotation marks

        self.run = trainer.run_config
        self.workers = trainer.scaling_config.num_workers
        self.epochs = trainer.train_loop_config["num_epochs"]
        self.start, self.last, self.epochs_done = time.monotonic(), time.time(), 0
        self.lines, self.seconds, self.seen = [], [], set()
        in_notebook = hasattr(get_ipython(), "kernel")
        self.text = Pretty
        self.handle = display(Pretty("starting the worker processes"), display_id=True) if in_notebook else None
        self.done = threading.Event()
        context = contextvars.copy_context()  # the thread writes into the cell that started it
        self.thread = threading.Thread(target=context.run, args=(self._watch,), daemon=True)
        self.thread.start()

    def stop(self):
        self.done.set()
        self.thread.join()
        with contextlib.suppress(OSError, ValueError):  # or it would take the place of what `fit()` raised
            self._read()
        self._draw(f"fit() took {time.monotonic() - self.start:.0f} s in total")

    def _watch(self):
        while not self.done.wait(0.5):
            with contextlib.suppress(OSError, ValueError):  # a report that is half written is read next time
                self._read()
            epoch = f"epoch {self.epochs_done + 1}/{self.epochs}"
            running = f"{epoch} is running" if self.lines else "starting, then epoch 1"
            running = running if self.epochs_done < self.epochs else "finishing"
            self._draw(f"{running} … {time.monotonic() - self.start:.0f} s")

    def _read(self):
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
            epoch = metrics.get("epoch", self.epochs_done) + 1
            self.epochs_done = epoch - ("step" in metrics)  # a report inside an epoch says after which step
            step = f", step {metrics['step']}" if "step" in metrics else ""
            self.lines.append(f"epoch {epoch}/{self.epochs}{step}   {values}   {took}")
            if now > self.last:
                self.seconds.append(now - self.last)
                self.last = now
            if self.handle is None:
                print(self.lines[-1])

    def _draw(self, last_line):
        if self.handle is not None:
            lines = [f"{self.run.name} · workers: {self.workers}", *self.lines, last_line]
            self.handle.update(self.text("\n".join(lines)))
