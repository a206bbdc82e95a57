// The plain data between the binding and the kernels: what monokernel/problem.py is to the backends.
//
// A Problem holds every static fact; a call adds pointers. No tensor type appears: all
// operands are contiguous, of the problem's dtype, and never null unless said so.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kinds.h"

// Kinds of nodes: first the elementwise ones.
#define MK_ONE(name, Kind, flat) +1
constexpr int kinds = MK_KINDS(MK_ONE);
#undef MK_ONE
enum NodeKind : int64_t {
  node_linear = kinds,
  node_prelu,
  node_scale,
  node_dropout,
  node_shift,
  node_line,
  node_sum,
  node_product,
  node_expand,
  node_total,
  node_concat,
  node_columns,
  node_normalise,
  node_root_mean_square,
  node_softmax,
  node_log_softmax,
  node_kinds
};

// Of the elementwise kinds those whose σ'' is zero everywhere.
#define MK_FLAT(name, Kind, flat) flat,
constexpr bool piecewise_linear[kinds] = {MK_KINDS(MK_FLAT)};
#undef MK_FLAT

// The parameter of a dropout: a key, one number for each byte.
constexpr int64_t key_bytes = 8;

// Node i makes value i + 1 of earlier values (0 is x); see monokernel/program.py.
struct Node {
  int64_t kind, width;
  int64_t inputs, params;  // how many
  const int64_t* input;    // values
  const int64_t* place;    // places among the call's parameters
  const double* numbers;
  bool curved;   // whether its curvature is not zero everywhere
  bool varies;   // whether its Jacobian depends on its inputs
  bool reads_v;  // whether the Jacobian is computed from v
};

// What a program says of a value whatever the operands.
struct Flow {
  bool used;      // y depends on it
  bool moving;    // x2 reaches it
  bool constant;  // its tangent is the same in every row
  bool uniform;   // its cotangent P is the same in every row
  bool kept;      // the backward has its cotangent as gy∘P + q: one output in adjoint mode
  bool saved;     // forward leaves it for backward
  bool pulled;    // forward leaves its P for backward
  bool viewed;    // columns of it are read in whole vectors from the middle
  bool parted;    // all that reads it are views of whole vectors that make it up
  bool part;      // it is such a view: its cotangent is a view of its input's
  bool once;      // one node reads it, once
  bool follows;   // an elementwise node that reads the value before it, a linear one's
};

// Columns of x side by side that are constrained: `count` from `first` on, of all that are those from
// `at` on.
struct Run {
  int64_t first, at, count;
};

// A program over x (N, d) with outputs y (N, D). x2 are k columns of x.
struct Problem {
  int64_t d, D, k;
  int64_t count, params;  // nodes and parameters
  const Node* nodes;
  const Flow* flow;        // count + 1
  bool adjoint;            // mode: one chain for each output, else one for each monotone column
  const int64_t* columns;  // (k,), ascending: which columns of x are x2
  const Run* runs;         // the same
  int64_t run_count;
  bool hinge, squared, elementwise;
  const double* margin;     // (D, k), present with hinge
  const double* direction;  // (D, k) in {-1, 0, 1}, present with hinge

  bool keeps_adjoint() const { return adjoint && D == 1; }
  bool side_by_side() const { return run_count == 1; }
  int64_t width(int64_t value) const { return value ? nodes[value - 1].width : d; }
};

// What benchmarks/ablation.py can switch off: that one product takes primal and tangent rows, and
// that only rows which violate take part in the slopes' backward.
struct Switches {
  bool stacks, compacts;
};
extern Switches switches;

// What forward leaves for backward: at most this many buffers, of so many elements for each row.
constexpr int max_saved = 3;
struct Saved {
  int64_t size[max_saved];
};

struct ForwardCall {
  int64_t N;
  int threads;
  const void* x;
  const void* weight;  // (D, k), or (N, D, k) if weight_per_row; or null: all ones
  bool weight_per_row;
  const void* const* params;  // by place; a bias may be null
  const int64_t* sizes;       // elements of each: one for all columns, or one for each
  void *y, *out;              // (N, D) and (N, D, k), or the scalar penalty
  void* const* saved;         // null: nothing is saved
};

// What a backward walks over for the gradients that it is asked for; by value.
struct Way {
  bool wanted;   // a gradient is wanted at the value or below it
  bool trained;  // parameters of its node want a gradient
  bool value;    // it is needed again
  bool first;    // what its node's Jacobian is computed from is needed again
  bool dot;      // the pairs' tangent of it is needed
};

struct BackwardCall {
  int64_t N;
  int threads;
  const void* x;
  const void* const* params;
  const int64_t* sizes;
  const void *gy, *gout;  // may be null
  void* const* saved;
  void* gx;            // may be null
  void* const* grads;  // as params, null where no gradient is wanted
  const Way* way;      // count + 1
};

// σ or σ' of an elementwise node as the range of it over an interval needs it, which is monotone
// between its turns; see monokernel/ranges.py.
struct Curve {
  double limits[2];           // at -∞ and ∞
  double relative, absolute;  // what it is known to: epsilons of its size, and what comes on top
  double period;              // of the turns, or 0
  int64_t turns;
  const double* turn;  // place, least and greatest of each
};

// B boxes over which the slopes of a problem in k columns of x are bounded, and what the bound is for: a
// linear term that makes every slope at least the margin in its direction. The problem's own k is 0 then.
struct Box {
  int64_t B, k;
  const double* ends;       // (2, B, d), lower and upper
  const double* direction;  // (D, k) in {-1, 0, 1}
  const double* middle;     // (k,), where the linear term is 0
  const int64_t* columns;   // (k,)
  const Curve* curves;      // (count, 2)
  double margin;
};

struct LiftCall {
  int64_t N;
  const void* x;              // (N, d)
  const void* const* params;  // as in ForwardCall
  const int64_t* sizes;
  void *y, *bound;  // (N, D), to which the term is added, and (D, k)
  double* saved;    // what backward needs
};

struct LiftBackwardCall {
  int64_t N;
  const void* x;
  const void* const* params;
  const int64_t* sizes;
  const double* saved;
  const void *gy, *gbound;  // gbound may be null
  void* gx;                 // may be null
  void* const* grads;       // as in BackwardCall; to these and to gx is added
};

// A chain of linear layers, each before an activation, in double; see monokernel/quadratic.py.
struct ChainLayer {
  int64_t in, out, kind;
  double numbers[3];
  Curve curve[3];        // σ, σ' and σ''
  double third, fourth;  // bounds of |σ'''| and |σ''''|
  const double *W, *b;   // (out, in) and (out,)
};

struct Chain {
  int64_t layers, folded;  // folded: how many roundings made each weight
  const ChainLayer* layer;
};

// What is known of K slopes over each of B boxes: (B, K), but (B, d, K) slant, bend, rise and blame.
struct SlopesFound {
  double *centre, *slant, *bend, *error, *rise, *blame, *lower, *upper;
};

struct SlopesCall {
  int64_t B, m, output, K;
  const double *c, *r;     // (B, d): the boxes are c ± r
  const int64_t* moving;   // (m,): the columns in which a box may have an extent
  const int64_t* columns;  // (K,): of the slopes
  const bool* wanted;      // (B, K), or null: all
  SlopesFound found;       // as it is where nothing is wanted or moves
};

// What the kernels need of the process: PyTorch's thread pool and one block of memory.
typedef void (*Task)(int64_t begin, int64_t end, void* context);
struct Runtime {
  void (*parallel)(int64_t tasks, Task task, void* context);
  void* (*acquire)(size_t bytes);  // aligned to a cache line; null if there is no memory
  void (*release)(void* memory, size_t bytes);
};

enum Status { ok = 0, out_of_memory = 1 };

// The kernels of one instruction set and one dtype.
struct Kernels {
  void (*saved)(const Problem&, Saved*);
  Status (*forward)(const Problem&, const ForwardCall&, const Runtime&);
  Status (*backward)(const Problem&, const BackwardCall&, const Runtime&);
  int64_t (*bound_size)(const Problem&, const Box&);  // elements of what a bound saves
  Status (*lift_forward)(const Problem&, const Box&, const LiftCall&, const Runtime&);
  Status (*lift_backward)(const Problem&, const Box&, const LiftBackwardCall&, const Runtime&);
  void (*activation)(int kind, const double* numbers, int64_t n, const void* a, void* value,
                     void* first, void* second);
};

struct InstructionSet {
  const char* name;
  Kernels float32, float64;
  Status (*chain_slopes)(const Chain&, const SlopesCall&, const Runtime&);
};

extern const InstructionSet baseline_kernels;
#if defined(__x86_64__)
extern const InstructionSet avx2_kernels, avx512_kernels;
#endif
