"""`ray job submit --working-dir . -- python jobs/pipeline.py CONFIG key=value ...`: the same as `ftray pipeline`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the uploaded working directory, when ftray is not installed

from ftray.cli.main import main

if __name__ == "__main__":  # processes that tokenise import this file again
    main(["pipeline", *sys.argv[1:]])
