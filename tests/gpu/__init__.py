"""Tests of the Triton kernels on a device, and the cases they share with the interpreter's."""
