// A problem as the library owns it, and what its program says of itself; no kernel, no tensor.
#pragma once

#include "c_api.h"
#include "problem.h"

#include <vector>

struct OwnedProblem {
  Problem problem;
  const Kernels* kernels;
  std::vector<Node> nodes;
  std::vector<Flow> flow;
  std::vector<int64_t> places;       // the inputs and parameters of all nodes
  std::vector<int64_t> constrained;  // columns of x
  std::vector<Run> runs;
  std::vector<double> numbers, margin, direction;
  std::vector<mk_parameter> parameters;
  mk_shape shape;
  int64_t owners;
  Box box;  // once a problem has one: of the next three
  std::vector<Curve> curves;
  std::vector<int64_t> columns;
  std::vector<double> box_numbers;
};

// The names of the kinds of nodes in the order of their codes, between spaces.
extern const char* const node_names;

// Fills in everything but kernels, shape.saved and owners from what mk_problem_new is given.
void describe(OwnedProblem* owned, const int64_t* flags, int64_t d, int64_t k,
              const int64_t* columns, int64_t count, const int64_t* nodes, const double* numbers,
              const double* margin, const double* direction);

// Fills in the box from what mk_problem_box is given.
void describe_box(OwnedProblem* owned, int64_t boxes, int64_t k, const double* ends,
                  const int64_t* columns, const double* direction, const double* middle,
                  double margin, const double* curves);

// The layers of a chain as mk_chain_slopes is given them; its numbers are not copied.
std::vector<ChainLayer> chain_of(int64_t layers, const mk_layer* chain);

// What a backward walks over; `grads` is null where a parameter's gradient is not wanted.
std::vector<Way> way_down(const Problem& problem, bool input, const void* const* grads);
