"""Processes in stock: started while nobody waits for them, so that `fit()` finds them ready.

A process and its imports take a small machine more than a second, and `fit()` needs seven of them, most of them one
after the other. Ray has a stock of its own, as many processes as it has CPUs; but it gives a process only to work that
wants the environment variables it was started with, and Ray Train adds some. So the stock is ordered here, from a
service that every Ray node has. On two cores the first step came 6 to 8 seconds after the call, without it 12 to 14.
"""

import json

import ray
from ray.runtime_env import RuntimeEnv

KEEP_SECONDS = 4 * 3600  # a workshop; what is left after that, Ray may end
READERS = 2  # processes that run data tasks: what two cores keep busy, and enough to begin with on more


def order_for_data() -> None:
    """Order what a notebook needs to read a dataset: two tasks, and the two actors that Ray Data always has."""
    _order("{}", READERS + 2)


def order_for_training(workers: int, readers: int = READERS) -> None:
    """Order what a `fit()` with so many workers needs, and as many processes that read for it.

    Its controller starts a process each that removes what a dead run had reserved, that lets workers wait for each
    other and that hands out datasets; two that split the datasets `train` and `test`, if there are several workers to
    split them for; and the workers. The process that iterates over a dataset starts the tasks that read it.
    """
    from ray.train.v2._internal.constants import (
        DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
        RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
        get_env_vars_to_propagate,
    )

    variables = get_env_vars_to_propagate()
    variables.setdefault(RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR, DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE)
    # Ray compares letter by letter. A driver writes the variables with spaces between them, and what inherits them
    # has the same letters; a process that names them itself, as the controller does for its workers, writes none.
    written_by_driver = RuntimeEnv(env_vars=variables).serialize()
    written_by_controller = json.dumps(json.loads(written_by_driver), separators=(",", ":"))
    if workers == 1:
        _order(written_by_driver, 4)
        _order(written_by_controller, 1 + readers)
    else:
        _order(written_by_driver, 6 + readers)
        _order(written_by_controller, workers)


def _order(environment: str, count: int) -> None:
    """Ask this machine's node to start `count` processes with that environment; returns before they are there."""
    # Not above: Ray's processes import this module and order nothing.
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.common_pb2 import Language
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    request = PrestartWorkersRequest(language=Language.PYTHON, num_workers=count, keep_alive_duration_secs=KEEP_SECONDS)
    request.runtime_env_info.serialized_runtime_env = environment
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=5)
        except grpc.RpcError:
            return  # without a stock everything works, only later
