"""The same with a checkpoint every 20 steps."""

import through_ray

if __name__ == "__main__":
    through_ray.run("checkpoint.every=20")
