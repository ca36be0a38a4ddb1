"""The script of the core path as a job on two hosts: stopped while it trains, and submitted again, it resumes."""

import re
import shutil

import pytest

from cluster.on_hosts import notebook, python, started
from support import NOTEBOOKS

pytestmark = pytest.mark.cluster
EPOCHS = 3
# Submit the script, wait until the condition holds, stop the job if it still runs, and print its status and its log.
JOB = """
import os
import sys
import time

from ray.job_submission import JobSubmissionClient

folder, storage, epochs, stop_at = sys.argv[1:]
client = JobSubmissionClient()
command = f"{sys.executable} train.py --name job --storage {storage} --epochs {epochs}"
secrets = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
job = client.submit_job(entrypoint=command, runtime_env={"working_dir": folder, "env_vars": secrets})
while not client.get_job_status(job).is_terminal() and not (stop_at and stop_at in client.get_job_logs(job)):
    time.sleep(0.5)
client.stop_job(job)
while not client.get_job_status(job).is_terminal():
    time.sleep(0.5)
print(client.get_job_logs(job))
print("status", client.get_job_status(job).value)
"""


@pytest.fixture(scope="module")
def hosts_with_jobs():
    yield from started(2, bucket=True, dashboard=True)


def test_job_that_was_stopped_while_it_trained_resumes(hosts_with_jobs, tmp_path):
    hosts = hosts_with_jobs
    shutil.copy(NOTEBOOKS / "train.py", tmp_path)
    variables = notebook(hosts, "bucket", RAY_ADDRESS=None, RAY_API_SERVER_ADDRESS="http://127.0.0.1:8265")
    arguments = (tmp_path, f"{hosts.bucket}/jobs", EPOCHS)

    first = python(hosts, JOB, *arguments, f"epoch 2/{EPOCHS}", **variables)
    assert "status STOPPED" in first and f"epoch 1/{EPOCHS}: " in first, first[-3000:]

    second = python(hosts, JOB, *arguments, "", **variables)
    assert "status SUCCEEDED" in second, second[-3000:]
    resumed = re.search(r"resumed after epoch (\d+)", second)
    assert resumed, second[-3000:]
    trained = {int(epoch) for epoch in re.findall(rf"epoch (\d+)/{EPOCHS}: ", second)}
    assert trained == set(range(int(resumed[1]) + 1, EPOCHS + 1)), second[-3000:]
    assert float(re.search(r"test accuracy (\S+) \(job, ", second)[1]) > 0.9, second[-3000:]
