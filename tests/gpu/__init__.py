"""Tests of the Triton kernels on a device."""
