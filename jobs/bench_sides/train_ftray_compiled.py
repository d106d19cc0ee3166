"""Our loop and engine with compiled decoder layers; the first step, which compiles, is not timed but told."""

import bare_loop

if __name__ == "__main__":
    bare_loop.run("compile=true")
