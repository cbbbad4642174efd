# SPDX-License-Identifier: Apache-2.0
from typing import Any

# Addresses, sizes and codes, in the order of csrc/cuda/bindings_cuda.cpp.
def __getattr__(name: str) -> Any: ...
