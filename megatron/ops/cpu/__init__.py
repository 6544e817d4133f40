"""Kernels in C++ for the CPU, for what PyTorch computes there in several passes; built when a run first needs one.

A family of kernels is a file `x.cpp` of `extern "C"` functions over pointers and sizes, with an `x.py` beside it: the
Python functions with the signatures of the formulae. To add one:

1. `x.cpp`: include `vectors.h` (what a vector of floats is, its loads from and stores to fp32, bf16 and fp16, exp),
   `columns.h` (loops over a row of any width) and `parallel.h` (`parallel_for`, by PyTorch's own threads); products
   are made of `tiles.h` (sums that stay in registers) and `packing.h` (copies in the order of reading). Functions
   return an int64, 0 where nothing is to be told, and are `DEEPY_EXPORT`. No instruction of one processor but beside a
   general form, no other library; results never depend on the threads.
2. `x.py`: `kernel("deepy_x", "ppi")` of `library.py` is the function, by the letters of its arguments; `is_plain` says
   whether tensors have memory that it can take. Everything else (other dtypes, fake tensors, torch.compile) goes to
   the eager function, from within the Python function.
3. A candidate in `ops/catalogue.py`: `_cpp("x:name")`. `auto` takes it on a CPU from then on, if it agrees with the
   formula in the operation's probe; `false` and `eager` are PyTorch's functions.
4. `tests/ops/cpu/test_x.py`: beside the twin, in every dtype, at odd sizes, with one and two threads.

All files are built into one library, which takes a few seconds: `library.py` says where and by what.
"""
