"""OpenAI's API as data: requests, answers, tools, messages. No I/O."""
