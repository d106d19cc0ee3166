"""What a worker gets of the driver's environment, and what of it is secret."""

import os

# Passed from the driver's environment to the workers.
WORKER_ENVIRONMENT = (
    "HF_HOME",
    "HF_ENDPOINT",
    "WANDB_BASE_URL",
    "HF_HUB_OFFLINE",
    "GLOO_SOCKET_IFNAME",
    "XDG_CACHE_HOME",
    "FTRAY_CACHE_GIB",
)
NETWORK_PREFIXES = ("NCCL_", "TORCH_NCCL_", "FI_", "OFI_NCCL_")  # cluster/network/
# Passed on as an argument: Ray writes the environment that it makes for a worker into its logs.
SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
OF_STORES = ("AWS_", "GOOGLE_", "AZURE_")  # prefixes of all that obstore reads: keys, regions, addresses, roles


def worker_environment(gpus_each: int) -> dict[str, str]:
    # Relative paths stay the driver's; Ray would move each worker into the checkpoint folder.
    fixed = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TOKENIZERS_PARALLELISM": "false"}
    if gpus_each == 0:
        fixed["DS_ACCELERATOR"] = "cpu"
    return fixed | passed_environment()


def passed_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in WORKER_ENVIRONMENT or name.startswith(NETWORK_PREFIXES)
    }


def passed_secrets() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in SECRETS or name.startswith(OF_STORES)}
