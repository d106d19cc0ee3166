"""What a row is before it is read, and what happens at each step: functions of one's own."""


def without_instructions(row):
    """The question and the answer alone."""
    return {"messages": [turn for turn in row["messages"] if turn["role"] != "system"]}


def print_evaluations(record):
    if "eval_loss" in record:
        print(f"  step {record['step']}: {record['eval_loss']:.3f} by my own callback")
