"""A driver that kills itself once its run has a checkpoint; lesson 07 starts it: python dying_driver.py NAME."""

import os
import signal
import sys
import threading
import time

import pyarrow.fs
import ray
import ray.train

from helpers import cluster, faults, progress


def kill_worker_or_wait():
    if ray.train.get_checkpoint() is None:
        faults.kill_worker()
    time.sleep(60)  # the driver dies before, and this worker with it


def die_after_first_report(run_config):
    # `ReportWriter` writes a report after Ray Train has registered the checkpoint that came with it.
    filesystem, folder = progress.reports_folder(run_config)
    while not filesystem.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True)):
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


name = sys.argv[1]
cluster.connect()
step_log = ray.get_actor(name, namespace="faults")
train_loop = faults.inject_faults(step_log, kill_worker_or_wait)
trainer = faults.build_short_trainer(name, max_failures=1, train_loop=train_loop)
threading.Thread(target=die_after_first_report, args=[trainer.run_config], daemon=True).start()
trainer.fit()
