"""The same with a checkpoint of 1.6 GB every 20 steps."""

import through_ray

if __name__ == "__main__":
    through_ray.run("adapter=null", "checkpoint.every=20")
