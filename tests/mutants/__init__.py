# SPDX-License-Identifier: Apache-2.0
"""Changes that break a kernel, and the tests that must notice: ``make mutants``."""
