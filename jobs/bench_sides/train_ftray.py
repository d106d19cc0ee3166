"""Our loop and engine: packed rows, logits at trained positions only."""

import bare_loop

if __name__ == "__main__":
    bare_loop.run()
