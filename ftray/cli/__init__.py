"""The `ftray` command. Only arguments and printing; what is heavy is imported by the command that needs it."""
