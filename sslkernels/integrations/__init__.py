# SPDX-License-Identifier: Apache-2.0
"""Drop-ins with the names, arguments and defaults of other libraries, and functions to swap them in.

``sslkernels.integrations.lightly`` and its neighbours hold the drop-ins, to be imported one by one;
``patch`` puts them into the installed library, also where other modules have imported its classes
already:

    import sslkernels

    sslkernels.patch("lightly")                # from here on lightly's NTXentLoss is ours
    ...
    sslkernels.unpatch("lightly")              # and now it is lightly's again

    with sslkernels.patch("lightly"):          # the same for a block
        ...

The libraries are no dependencies.  Nothing of them is imported before it is asked for.
"""

from sslkernels.integrations._patching import Patch, patch, patched, unpatch

__all__ = ["Patch", "patch", "patched", "unpatch"]
