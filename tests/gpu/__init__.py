"""Tests of the Triton kernels that need a device, and the cases they share with the interpreter's."""
