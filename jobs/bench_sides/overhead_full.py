"""One worker through Ray, all weights trained; nothing is saved before the end."""

import through_ray

if __name__ == "__main__":
    through_ray.run("adapter=null")
