"""`ray job submit --working-dir . -- python jobs/sweep.py CONFIG key=value ...`: the same as `ftray sweep`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the uploaded working directory, when ftray is not installed

from ftray.cli.main import main

if __name__ == "__main__":  # processes that tokenise import this file again
    main(["sweep", *sys.argv[1:]])
