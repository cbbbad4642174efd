# SPDX-License-Identifier: Apache-2.0
"""torch.library schemas, fakes and autograd, and the choice of a backend."""
