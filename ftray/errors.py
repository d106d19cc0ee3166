"""Errors that reach a person. Each message says the key or object, its value, the rule and the fix.

They cross process borders (Ray pickles them), so every one is rebuilt from `args` alone.
"""


class FtrayError(Exception):
    """The work failed for a reason ftray can name. Exit code 1."""

    exit_code = 1


class UserError(FtrayError):
    """The user's input is wrong; nothing costly was started and nothing was lost. Exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """One report with every problem of a configuration file."""

    def __init__(self, source: str, problems: list[str]):
        super().__init__(source, problems)
        self.source = source
        self.problems = problems

    def __str__(self) -> str:
        head = f"{self.source}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


class RequestError(UserError):
    """A request that an engine can never answer. `code` and `param`: as OpenAI's API names them."""

    def __init__(self, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message, code, param)
        self.code, self.param = code, param

    def __str__(self) -> str:
        return self.args[0]


class DataError(UserError):
    """A data file, or a row of one, cannot be used as it is."""


class AdapterError(UserError):
    """An adapter directory is corrupt, or does not fit the base model or the engine."""


class UnwritableError(UserError):
    """A directory cannot be made or written now: no room, or no permission."""


class NotFoundError(UserError):
    """A name that is in no registry, file or endpoint."""


class DamagedError(FtrayError):
    """A directory is not what its manifest says: cut short, changed, or never completed."""


class IncompleteError(DamagedError):
    """It has no manifest: a writer died before its end, and nobody counts on it."""


class StoreError(FtrayError):
    """An object store or disk did not do what was asked of it; another time it may."""


class ConflictError(FtrayError):
    """Another writer was first, or the name is taken."""


class DivergedError(FtrayError):
    """The loss is no number any more, or far above what it was; what was saved before stands."""


class InterruptedRunError(FtrayError):
    """The user stopped the work; what was saved stands."""


class TerminatedRunError(InterruptedRunError):
    """The machine or scheduler asked for an end (SIGTERM); the run was saved. The shell's code for that signal."""

    exit_code = 143
