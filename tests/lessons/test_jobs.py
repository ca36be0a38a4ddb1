"""The cluster of lesson 14 is closed to others and ends with its notebook, and KubeRay would take its manifest."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import nbformat
import psutil
import pytest
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from helpers import settings
from support import NOTEBOOKS, wait_for

# Put after the cell that waits for the head: note what runs and where it listens, then fail as a learner's cell may.
FAILING_CELL = """
import json
tree = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
sockets = [socket for process in tree for socket in process.net_connections() if socket.status == "LISTEN"]
found = {"processes": [process.pid for process in tree], "hosts": [socket.laddr.ip for socket in sockets]}
Path(REPORT).write_text(json.dumps({**found, "folder": folder}))
raise RuntimeError("a cell failed")
"""
# The keys that rayjob.yaml uses, with their types and limits in version v1 of KubeRay 1.7's
# helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml. The whole schema has 13,000 lines.
TEXT, COUNT, TEXTS = {"type": "string"}, {"type": "integer"}, {"additionalProperties": {"type": "string"}}


def fields(*required, **properties):
    return {"type": "object", "required": list(required), "additionalProperties": False, "properties": properties}


def each(item):
    return {"type": "array", "items": item}


SECRET = fields(secretRef=fields(name=TEXT))
CONTAINER = fields("name", name=TEXT, image=TEXT, envFrom=each(SECRET), resources=fields(limits={"type": "object"}))
TEMPLATE = fields(spec=fields("containers", containers=each(CONTAINER)))
GROUP = {"groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT}
RAY_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}),
    headGroupSpec=fields("template", rayStartParams={"type": "object", **TEXTS}, template=TEMPLATE),
    workerGroupSpecs=each(
        fields(
            *("groupName", "maxReplicas", "minReplicas", "template"),
            **GROUP,
            rayStartParams={"type": "object", **TEXTS},
            template=TEMPLATE,
        )
    ),
)
RAY_JOB = fields(
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(name=TEXT),
    spec=fields(
        entrypoint=TEXT,
        backoffLimit=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=RAY_CLUSTER,
    ),
)


def code_cells(lesson):
    return [cell for cell in nbformat.read(NOTEBOOKS / lesson, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture
def after_an_error(tmp_path, monkeypatch):
    """What the lesson had started when one of its cells failed, and its kernel ended."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # another Ray, which the lesson must leave alone
    cells = code_cells("14_jobs.ipynb")
    last = next(number for number, cell in enumerate(cells) if "address = find_address()" in cell.source)
    cells = cells[: last + 1]
    for cell in cells:  # train.py has a test of its own
        cell.source = cell.source.replace('["python", "train.py"', '["python", "-c", "pass"')
        cell.source = cell.source.replace("assert epochs_stored() in (1, 2)", "assert epochs_stored() == 0")
    report = tmp_path / "report.json"
    cells.append(nbformat.v4.new_code_cell(FAILING_CELL.replace("REPORT", repr(str(report)))))
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError, match="a cell failed"):
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return json.loads(report.read_text())


def runs(pid):
    """Whether the process runs: in a container, one that has ended may be kept as a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_jobs_cluster_is_closed_to_others_and_ends_after_an_error(after_an_error):
    hosts = {host.removeprefix("::ffff:") for host in after_an_error["hosts"]}
    assert len(after_an_error["processes"]) >= 5 and hosts == {"127.0.0.1"}
    wait_for(lambda: not any(map(runs, after_an_error["processes"])), "the cluster outlived its kernel")
    assert not Path(after_an_error["folder"]).exists()


def test_jobs_manifest_has_the_form_of_its_schema_and_suits_the_script():
    manifest = yaml.safe_load((NOTEBOOKS / "rayjob.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(manifest, RAY_JOB)
    pinned = re.search(r"^ray==(\S+)", (settings.PROJECT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    script = (NOTEBOOKS / "train.py").read_text(encoding="utf-8")
    for option in re.findall(r"--\w+", manifest["spec"]["entrypoint"]):
        assert f'add_argument("{option}"' in script, option


def test_jobs_help_names_the_options_that_the_lesson_uses():
    """The command lines that the lesson shows, but which need a cluster of many machines to run."""
    shown = "\n".join(cell.source for cell in nbformat.read(NOTEBOOKS / "14_jobs.ipynb", as_version=4).cells)
    for command, options in {"symmetric-run": ["--address", "--min-nodes"], "get-auth-token": ["--generate"]}.items():
        assert all(re.search(rf"ray {command} [^\n`]*{option}", shown) for option in options)
        ray = [sys.executable, "-m", "ray.scripts.scripts", command, "--help"]
        text = subprocess.run(ray, capture_output=True, text=True, check=True).stdout
        assert all(option in text for option in options), text
    # `symmetric-run` hands no address on: without this, the script would train on the first node alone.
    assert re.search(r"env RAY_ADDRESS=\S+ python train\.py", shown)
