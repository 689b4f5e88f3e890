"""Base class of the errors that users can cause and fix."""

from __future__ import annotations


class UserError(ValueError):
  """Invalid input, or a file that cannot be used.

  The message names the file or value, the rule and the fix. `cli.run` prints it as one line,
  without a traceback, and exits with status 1. Every error that users can cause derives from it.
  """
