"""What more nodes cost: `python tests/soak/scale.py` starts clusters of 2 to 16 Ray nodes on this machine, one worker a
node, and writes docs/benchmarks/scale.json.

Measured are Ray's parts, by workers that do nothing else: nodes joining, a worker group starting, the barrier of
`ray.train.report`, and a checkpoint whose files come from all ranks. All nodes share this machine's cores, so what
costs CPU (starting processes) grows faster here than on machines of their own; the barrier and the fan-in are messages
and files.
"""

import json
import logging
import os
import platform
import secrets
import statistics
import tempfile
import time
from pathlib import Path

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "scale.json"
NODES = (2, 4, 8, 16)
REPORTS = 20
SHARD_BYTES = 1 << 20

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}


def train(settings: dict) -> None:
    """In each worker. Rank 0 writes down when it began and how long it waited."""
    import ray.train
    from ray.train import Checkpoint

    from ftray.storage import list_files, verify_directory, write_manifest

    began = time.time()
    rank, directory = ray.train.get_context().get_world_rank(), Path(settings["directory"])
    barrier, fan_in = [], []
    for _ in range(REPORTS):
        asked = time.perf_counter()
        ray.train.report({"rank": rank})
        barrier.append(time.perf_counter() - asked)
    for number in range(REPORTS // 4):
        asked = time.perf_counter()
        target = directory / "checkpoints" / f"step-{number}"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"rank-{rank}.bin").write_bytes(os.urandom(SHARD_BYTES))
        ray.train.report(
            {"rank": rank},
            checkpoint=Checkpoint(str(target)),
            checkpoint_dir_name=f"step-{number}",
            checkpoint_upload_fn=lambda checkpoint, name: checkpoint,
        )
        if rank == 0:  # every rank has reported: its file is there
            write_manifest(target, metadata={}, files=list_files(target))
            assert len(verify_directory(target).files) == settings["workers"]
        fan_in.append(time.perf_counter() - asked)
    if rank == 0:
        reported = {"began": began, "barrier_s": statistics.median(barrier), "fan_in_s": statistics.median(fan_in)}
        (directory / "told.json").write_text(json.dumps(reported))


def measure(nodes: int) -> dict:
    import ray
    from ray.cluster_utils import Cluster
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from ftray.train.on_ray.trainer import set_ray_train

    set_ray_train(nodes)
    began = time.time()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20, wait=False)
    cluster.wait_for_nodes()
    joined = time.time()
    try:
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        with tempfile.TemporaryDirectory() as directory:
            asked = time.time()
            trainer = DataParallelTrainer(
                train,
                train_loop_config={"directory": directory, "workers": nodes},
                scaling_config=ScalingConfig(num_workers=nodes),
                run_config=RunConfig(name="checkpoints", storage_path=directory),
            )
            trainer.fit()
            reported = json.loads((Path(directory) / "told.json").read_text())
    finally:
        ray.shutdown()
        cluster.shutdown()
    return {
        "nodes": nodes,
        "nodes_join_s": round(joined - began, 2),
        "workers_start_s": round(reported["began"] - asked, 2),
        "report_barrier_ms": round(reported["barrier_s"] * 1000, 1),
        "checkpoint_fan_in_ms": round(reported["fan_in_s"] * 1000, 1),
    }


def main() -> None:
    rows = []
    for nodes in NODES:
        rows.append(measure(nodes))
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "bench": "scale",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores for all nodes together",
        "shard_bytes": SHARD_BYTES,
        "reports": REPORTS,
        "rows": rows,
    }
    OUT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
