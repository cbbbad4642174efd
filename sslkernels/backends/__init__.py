# SPDX-License-Identifier: Apache-2.0
"""The backends: modules with the primitives of ``interface.py``, chosen by ``ops/registry.py``."""
