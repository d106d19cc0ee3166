"""The same steps by the bare loop: no Ray, no saves, one thread as a worker has."""

import tempfile
from pathlib import Path

import through_ray
from one_process import train_bare

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ftray-bench-") as scratch:
        steps = train_bare(through_ray.write_config(Path(scratch), ()), num_threads=1)
    through_ray.report([step.as_dict() for step in steps])
