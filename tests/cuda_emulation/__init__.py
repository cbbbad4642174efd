# SPDX-License-Identifier: Apache-2.0
"""Runs csrc/cuda/*.cu on the CPU: the emulator, its build, a worker process, checks and twins."""
