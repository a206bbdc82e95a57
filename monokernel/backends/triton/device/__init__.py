"""Functions that kernels call: activations, the hinge, tiles of a layer. None is launched.

Only operations that Triton's interpreter knows are used (no libdevice, no inline assembly), so that
the same source runs with and without a GPU. Of all kernels, here and elsewhere, two things hold:

* Triton compiles what follows a branch that returned, also where the compiler has resolved it: with
  pointers that are None there. So what a branch leaves to do stands under its ``else``.
* Of an integer argument it makes one kernel where it is 1, one for multiples of 16, one for the
  rest. Numbers of rows and of programs change with the batch: they are marked
  ``do_not_specialize``.
"""
