# SPDX-License-Identifier: Apache-2.0
"""The one exception that the command line turns into a one-line message."""


class UserError(ValueError):
    """Something the user can put right: a flag, a file, a size.

    The message is one sentence that says what is wrong and what to do. The command line prints
    it without a traceback and ends with exit code 2.
    """
