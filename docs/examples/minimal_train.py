"""`python docs/examples/minimal_train.py CONFIG [key=value ...]`: a run's training loop, all of it, in one process.

It trains the steps that `ftray train CONFIG` trains and prints the same losses; what that adds around this loop: checks
before the start, Ray's workers, evaluation, checkpoints, resuming, a guard over the loss, a report.
"""

import sys

import torch

import ftray
from ftray.train.loop import seed_step


def main(config: str, overrides: list[str]) -> list[float]:
    losses = []
    with ftray.open_training(config, *overrides) as training:
        engine = training.engine
        for step in range(training.num_steps):
            examples = training.examples(step)  # a step is a set of examples, however many ranks share it
            seed_step(training.config.seed, step=step, rank=engine.rank)  # dropout's noise
            loss = engine.forward_backward(training.rows(examples), denominator=training.denominator(examples))
            grad_norm = engine.optim_step(lr=training.learning_rate(step))
            losses.append(loss.loss)
            print(f"step {step + 1}: loss {loss.loss:.6f}, gradient norm {grad_norm:.4f}")
        trained = {name: weight.clone() for name, weight in engine.weights()}
    print(f"{len(trained)} tensors, {sum(weight.numel() for weight in trained.values()):,} weights trained")
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)  # as a worker has them
    main(sys.argv[1], sys.argv[2:])
