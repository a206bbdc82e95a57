// The C interface of the library: what boundary.cpp calls by address and backends/native.py with ctypes.
//
// A problem is named by its handle, an opaque number. Who calls may read and write at every pointer: the
// library sees no sizes. Shapes are those of docs/mathematics.md and monokernel/nodes.py.
#pragma once

#include <stdint.h>

extern "C" {

// What one parameter of a problem must be: (rows, columns), or (columns,) where it has one dimension.
// `kind` is that of the node that reads it, the last if there are several, `layer` counts linear nodes
// from 1 on.
struct mk_parameter {
  int64_t kind, layer, dimensions, rows, columns;
  int64_t optional;     // it may be absent
  int64_t one_for_all;  // it may be one number (1,)
  int64_t drawn;        // it is no number to be trained
};

// What a caller must know of a problem; `parameters` lives as long as the problem.
struct mk_shape {
  int64_t d, D, k, params;
  int64_t is_double, summed;  // summed: the second output is one number
  int64_t bounded, bound;  // columns of which the slope is bounded; doubles that this saves, or 0
  int64_t saved[3];        // elements for each row of x: values, cotangents P and ∂penalty/∂J
  const mk_parameter* parameters;
};

// One linear layer of a chain and its activation, by its kind; see monokernel/quadratic.py. `curves` are
// σ, σ' and σ'' as in mk_problem_box, null where there is no activation; third and fourth bound |σ'''| and
// |σ''''|. W (out, width) and b (out,) are double, as all of a chain is.
struct mk_layer {
  int64_t width, out, kind;
  double numbers[3];
  double third, fourth;
  const double* curves;
  const double* W;
  const double* b;
};

// The instruction set in use.
const char* mk_isa();
// The address of PyTorch's `torch_parallel_for`, without which one thread does it all.
void mk_use_parallel_for(void* address);

// The kinds of nodes in the order of their codes, between spaces.
const char* mk_node_names();

// flags: is_double, adjoint, hinge, squared, elementwise. `nodes` is for each of the `count` nodes its
// kind, width, numbers of inputs, parameters and numbers, then the inputs and the places of the
// parameters; `numbers` are those of all nodes. `columns` (k,) are ascending; margin and direction are
// (D, k), or null without a hinge. All is copied, none is checked. Returns the handle, 0 where there is
// no memory.
int64_t mk_problem_new(const int64_t* flags, int64_t d, int64_t k, const int64_t* columns,
                       int64_t count, const int64_t* nodes, const double* numbers,
                       const double* margin, const double* direction);
// A problem has one owner at first. `keep` adds one, unless the number is no problem's handle: it returns
// 0 then, and 1 otherwise. Each owner drops it once.
int64_t mk_problem_keep(int64_t problem);
void mk_problem_drop(int64_t problem);
void mk_problem_shape(int64_t problem, mk_shape* shape);

// Memory for what forward saves, from the library's pool; null where there is none.
void* mk_take(int64_t bytes);
void mk_give_back(void* memory);

// Both return 0, or 1 where there is no memory for scratch. `sizes` are the elements of each
// parameter. Null may be: weight (all ones), saved (nothing is), an optional parameter; gy, gout, gx
// and the gradients that are not wanted. The key of a dropout has no gradient.
int mk_forward(int64_t problem, int64_t N, int64_t threads, const void* x, const void* weight,
               int64_t weight_per_row, const void* const* params, const int64_t* sizes, void* y,
               void* out, void* const* saved);
int mk_backward(int64_t problem, int64_t N, int64_t threads, const void* x,
                const void* const* params, const int64_t* sizes, const void* gy, const void* gout,
                void* const* saved, void* gx, void* const* grads);

// Gives a problem, before its first call, the `boxes` over which its slopes in k columns of x are bounded:
// `ends` (2, boxes, d), lower and upper; direction (D, k); middle (k,), where the linear term is 0.
// `curves` has for each elementwise node σ and then σ', and of each its limits at -∞ and ∞, its relative
// and its absolute error, its period, how many turns it has, and their three numbers each
// (monokernel/ranges.py). All is copied. Returns whether the bound knows all kinds of the problem's nodes.
int mk_problem_box(int64_t problem, int64_t boxes, int64_t k, const double* ends,
                   const int64_t* columns, const double* direction, const double* middle,
                   double margin, const double* curves);

// bound (D, k) is the least slope in its direction over all boxes; to y (N, D) is added the linear term
// that makes it the margin. `saved` has as many doubles as the shape says. backward adds to gx and to
// grads. Null may be: gbound, gx and the gradients that are not wanted. Both return 0, or 1 where there
// is no memory.
int mk_lift(int64_t problem, int64_t N, const void* x, const void* const* params,
            const int64_t* sizes, void* y, void* bound, void* saved);
int mk_lift_backward(int64_t problem, int64_t N, const void* x, const void* const* params,
                     const int64_t* sizes, const void* saved, const void* gy, const void* gbound,
                     void* gx, void* const* grads);

// Bounds of the slopes of one output of a chain in K columns over the boxes c ± r (boxes, d), which have
// an extent in the m columns `moving` alone: what monokernel/enclosures.py calls Slopes, in its order.
// Found is written where it is wanted (boxes, K), one byte each or null for all, and along the columns
// that move. `folded`: how many roundings made each weight. One thread does it; returns 0, or 1 where
// there is no memory.
int mk_chain_slopes(int64_t layers, const mk_layer* chain, int64_t folded, int64_t boxes,
                    const double* c, const double* r, int64_t m, const int64_t* moving,
                    int64_t output, int64_t K, const int64_t* columns, const void* wanted,
                    double* const* found);

// A chain of ReLUs or LeakyReLUs: `layers` hidden ones with `widths`, W_l (H_l, H_{l-1}), b_l (H_l,) and
// the slopes `left` of 0, of d columns; every weight is off by at most `folded` roundings.
struct mk_piecewise {
  int64_t d, layers, folded;
  const int64_t* widths;
  const double* const* W;
  const double* const* b;
  const double* left;
};

// A search for points of the box centre ± radius (d,), which has an extent in m columns, where the slope
// that `column` (H_1,), of W_1, and `row` (H_L,), of the last layer, make is below the margin. The network
// is not copied. `split` takes half of the open branches into another search, or returns null where
// there are too few. `run` bounds at most so many more, and ends with the branch in which its seconds
// do. `points` (8, d) are between the kinks where the slope may be below. `tally`: branches bounded,
// those proved, those open, points; `least` bounds the slope wherever it is below the margin. Null, or
// 1 from `run`, where there is no memory.
void* mk_search_new(const mk_piecewise* net, const double* row, const double* column, double margin,
                    const double* centre, const double* radius, int64_t m, const int64_t* moving);
void* mk_search_split(void* search);
int mk_search_run(void* search, int64_t most, double seconds, double* points, int64_t* tally,
                  double* least);
void mk_search_drop(void* search);

// For tests and benchmarks. σ, σ' and σ'' of n elements a; which ideas of the kernels are in use, for
// every problem from the next call on.
void mk_activation(int64_t is_double, int64_t kind, const double* numbers, int64_t n, const void* a,
                   void* h, void* s, void* c);
void mk_switch(int64_t stacks, int64_t compacts);
}
