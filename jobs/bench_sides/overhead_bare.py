"""The same steps by the bare loop: no Ray, no saves, one thread as a worker has."""

import tempfile
from pathlib import Path

import bare_loop
import through_ray

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ftray-bench-") as scratch:
        steps = bare_loop.train_bare(through_ray.write_config(Path(scratch), ()), num_threads=1)
    through_ray.report([step.as_dict() for step in steps])
