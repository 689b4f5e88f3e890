"""Errors that a person can mend: shown as one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
  """Bad input, or a file that cannot be used.

  The message names the file or value, the rule and the way out. `cli.run` prints it as one line and
  exits with 1; every error class that a user can cause derives from this one.
  """
