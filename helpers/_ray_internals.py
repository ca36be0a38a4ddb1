"""THE ONLY file that imports anything private from Ray: open it when a new release of Ray breaks something.

Each function that does says why it is needed, the upstream issue, what is lost without it, and when to delete it.
Private modules are imported inside the functions, and `@optional` lets no failure reach a lesson, which then runs
slower or says more.
"""

import contextlib
import functools
import json
import logging
import os
import time

# Variables that Ray reads when its processes start. An unknown one is ignored, so none of them can break a lesson.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # not every 2 s: an epoch ends up to 1.5 s sooner
    "RAY_preload_python_modules": "ray.data",  # imported by prestarted processes while nobody waits for them
    # Ray would start a process of 110 MB for each CPU that it is told of, needed or not (ray#27499).
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_maximum_startup_concurrency": "64",  # or Ray warns of the number of processes that training starts
}
# A killed node is noticed within two seconds instead of half a minute: for a lesson that kills one. How long a node
# may take to answer stays Ray's 10 s: on a busy machine, nodes that were alive took longer than one.
QUICK_HEALTH_CHECKS = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2"}
# Ray's state API takes what stands before `://` for a module, and calls `get_job_submission_client_cluster_info` in it.
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": f"{__name__}://no-dashboard"}
os.environ.update(ENVIRONMENT | dict(os.environ))  # on import, before Ray is started; what was set before stays

DATA_WORKERS = 2  # processes that run data tasks: what two cores keep busy, and enough to begin with on more


def optional(function):
    """Let `function` fail without consequences: it is logged for maintainers and returns None."""

    @functools.wraps(function)
    def attempt(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception:
            logging.getLogger(__name__).debug("%s is not available in this Ray", function.__name__, exc_info=True)

    return attempt


def get_job_submission_client_cluster_info(*_, **__):
    """Answer a process of a local Ray that asks for the dashboard: there is none.

    Why: a process of each run asks every second, logs each failure, and ends only after its last question. SystemExit
    ends its thread silently. Upstream: ray#58515. Without it: each `fit()` ends up to 1 s later, or 12 s where another
    Ray left its address. Delete when: Ray Train's placement-group cleaner works without a dashboard.
    """
    raise SystemExit("This Ray has no dashboard.")


@contextlib.contextmanager
def environment(variables: dict[str, str]):
    """Set environment variables inside this context, for the processes that are started there."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


@optional
def prestart_workers(num_training_workers: int = 0) -> None:
    """Let this machine start the processes that a dataset needs, or those of a `fit()`, one after another.

    Why: `fit()` needs seven to ten processes, most of them one after the other, and each takes more than a second. Ray
    reuses a waiting one only for work with the same environment variables, letter by letter, and Ray Train adds some.
    Upstream: ray#33621 (open). Without it: the first step comes 12 to 14 s after `fit()` instead of 6 to 8 s.
    Delete when: Ray Train reuses Ray's own idle processes.
    """
    if not num_training_workers:
        _prestart("{}", DATA_WORKERS + 2)  # Ray Data always has two actors
        return
    from ray.runtime_env import RuntimeEnv
    from ray.train.v2._internal import constants

    variables, blocking = constants.get_env_vars_to_propagate(), constants.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
    variables.setdefault(blocking, constants.DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE)
    # A driver writes the variables with spaces between them, and processes that inherit them keep the spelling. The
    # controller names them itself for its workers, and writes no spaces.
    by_driver = RuntimeEnv(env_vars=variables).serialize()
    by_controller = json.dumps(json.loads(by_driver), separators=(",", ":"))
    # One process each for the controller, placement-group cleanup, worker synchronisation and dataset management. With
    # several workers, one split coordinator per dataset, whose data tasks then inherit the driver's spelling.
    split = num_training_workers > 1
    _prestart(by_driver, 6 + DATA_WORKERS if split else 4, seconds_apart=1.5)
    _prestart(by_controller, num_training_workers + (0 if split else DATA_WORKERS), seconds_apart=1.5)


def _prestart(runtime_env: str, count: int, seconds_apart: float = 0) -> None:
    """Ask the node for `count` processes with the serialized `runtime_env`; each waits four hours, a workshop."""
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.common_pb2 import Language
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    request = PrestartWorkersRequest(language=Language.PYTHON, num_workers=1, keep_alive_duration_secs=4 * 3600)
    request.runtime_env_info.serialized_runtime_env = runtime_env
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for _ in range(count):
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=5)
            time.sleep(seconds_apart)


@optional
def remove_orphaned_placement_groups() -> None:
    """Free what is reserved for training runs of this driver whose controller process was killed.

    Why: Tune ends a stopped trial by killing its controller. Ray Train's own cleaner asks the dashboard (ray#58515),
    and a local Ray here has none. The public `placement_group_table()` does not say who made a group. Upstream: none
    found. Without it: a stopped trial keeps its CPUs until the notebook disconnects, so that a search on a small
    machine may wait forever. Delete when: Ray Train's cleaner works without a dashboard.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    mine = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for record in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        by_an_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        orphaned = group.creator_job_id == mine and by_an_actor and group.creator_actor_dead and not group.is_detached
        if orphaned and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


@optional
def refresh_reserved_resources() -> None:
    """Let elastic training notice at once that a node died or joined.

    Why: the actor that tells Ray Train which nodes there are looks every 20 s, which nothing documented changes. After
    a node's death, Ray Train would ask for as many workers as before, and wait. Upstream: none found. Without it: each
    change in lesson 09 takes up to a minute longer. Delete when: that interval can be set.
    """
    import ray

    name = "AutoscalingCoordinator"
    ray.get(ray.get_actor(name, namespace=name).get_reserved_resources.remote("", recompute=True), timeout=10)


@optional
def use_token(create: bool = False) -> None:
    """Join a Ray with this machine's token, if it has one; or let the Ray that is started next ask for a token.

    Why: `ray.init()` asks for one in what it starts, but takes none along to an address, and `Cluster` asks for none.
    Upstream: none found. Without it: set `RAY_AUTH_MODE=token`. Delete when: both are like the rest.
    """
    from ray._private.authentication import authentication_token_setup as setup

    if create:
        setup.enable_token_auth_by_default()
        setup.ensure_token_if_auth_enabled()
    else:
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


@optional
def show_worker_logs(shown: bool) -> None:
    """Show or hide what worker processes print, raylets' messages about them included.

    Why: `ray.init(log_to_driver=False)` still lets long messages about killed workers into the cell, which is what is
    lost without it. Upstream: ray#30832, ray#28216 (open). Delete when: `log_to_driver=False` hides them.
    """
    from ray._private import worker

    worker._worker_logs_enabled = shown


def is_ray_process(title: str) -> bool:
    """Whether a process with this command line belongs to Ray: a raylet, one of its helpers, or a worker."""
    return any(sign in title for sign in ("ray::", "/ray/core/", "/ray/_private/", "/ray/dashboard/"))
