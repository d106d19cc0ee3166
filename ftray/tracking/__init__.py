"""What a run leaves to look at: metrics.jsonl, environment.json, wandb, report.html."""
