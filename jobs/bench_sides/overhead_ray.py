"""One worker through Ray, LoRA; nothing is saved before the end."""

import through_ray

if __name__ == "__main__":
    through_ray.run()
