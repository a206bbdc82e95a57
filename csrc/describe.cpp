// What a program says of itself, once for each problem or each backward: plain loops over its nodes.
#include "describe.h"

#include <algorithm>
#include <utility>

#define MK_NAME(name, Kind, flat) #name " "
const char* const node_names =
    MK_KINDS(MK_NAME) "linear prelu scale dropout shift line sum product expand total "
    "concat columns normalise root_mean_square softmax log_softmax";
#undef MK_NAME

namespace {

// A first layer of so few inputs is computed again: that costs less than to save it.
constexpr int64_t few_inputs = 48;
// Of the widest vectors, AVX-512's in float32.
constexpr int64_t most_lanes = 16;

// The facts of a kind.
Node traits(int64_t kind) {
  Node node{};
  node.kind = kind;
  node.reads_v = kind == node_normalise || kind == node_root_mean_square || kind == node_softmax ||
                 kind == node_log_softmax;
  if (kind < kinds) {
    node.varies = kind != 0;
    node.curved = !piecewise_linear[kind];
  } else {
    node.varies = node.reads_v || kind == node_prelu || kind == node_product;
    node.curved = node.reads_v || kind == node_product;
  }
  return node;
}

// Whether x2 reaches a slice of x: all other columns stand still.
bool reaches_x2(const Problem& problem, const Node& node) {
  const int64_t start = int64_t(node.numbers[0]), step = int64_t(node.numbers[1]);
  return std::any_of(problem.columns, problem.columns + problem.k, [&](int64_t column) {
    const int64_t i = column - start;
    return i >= 0 && i % step == 0 && i / step < node.width;
  });
}

void find_runs(const int64_t* columns, int64_t k, std::vector<Run>* runs) {
  for (int64_t c = 0; c < k; ++c) {
    if (c && columns[c] == columns[c - 1] + 1) {
      ++runs->back().count;
    } else {
      runs->push_back({columns[c], c, 1});
    }
  }
}

// Views that make up a value, as a gate's two halves do: what comes down to each is written where it
// belongs in what comes down to the whole.
void find_parts(const Problem& problem, std::vector<Flow>* found) {
  std::vector<Flow>& flow = *found;
  std::vector<std::vector<std::pair<int64_t, int64_t>>> parts(problem.count +
                                                              1);  // start and width
  std::vector<char> fits(problem.count + 1, true);
  for (int64_t v = 1; v <= problem.count; ++v) {
    const Node& node = problem.nodes[v - 1];
    if (!flow[v].used) continue;
    const bool view = node.kind == node_columns && node.numbers[1] == 1;
    for (int64_t q = 0; q < node.inputs; ++q) {
      const int64_t u = node.input[q];
      // One row for all is a view of one row for all.
      fits[u] &= view && node.width % most_lanes == 0 && !flow[v].pulled &&
                 flow[v].uniform == flow[u].uniform;
      if (view) parts[u].emplace_back(int64_t(node.numbers[0]), node.width);
    }
  }
  for (int64_t u = 1; u <= problem.count; ++u) {
    if (!fits[u] || parts[u].empty()) continue;
    std::sort(parts[u].begin(), parts[u].end());
    int64_t end = 0;
    for (const auto& [start, width] : parts[u]) end = start == end ? end + width : -1;
    flow[u].parted = end == problem.width(u);
  }
  for (int64_t v = 1; v <= problem.count; ++v) {
    const Node& node = problem.nodes[v - 1];
    flow[v].part = flow[v].used && node.kind == node_columns && flow[node.input[0]].parted;
  }
}

void find_flow(const Problem& problem, std::vector<Flow>* found) {
  const int64_t y = problem.count;
  std::vector<Flow>& flow = *found;
  flow.assign(y + 1, Flow{});
  std::vector<char> trains(y + 1, false);  // a parameter lies at the value or below it
  std::vector<char> near(y + 1, true);     // no product lies between x and the value
  flow[0].moving = flow[0].constant = true;
  for (int64_t v = 1; v <= y; ++v) {
    const Node& node = problem.nodes[v - 1];
    Flow& f = flow[v];
    f.constant = !node.varies && node.kind != node_dropout;
    trains[v] = node.params > 0;
    for (int64_t q = 0; q < node.inputs; ++q) {
      const int64_t u = node.input[q];
      f.moving |= flow[u].moving;
      f.constant &= flow[u].constant || !flow[u].moving;
      trains[v] |= trains[u];
      near[v] &= near[u] && node.kind != node_linear;
    }
    if (node.kind == node_columns && node.input[0] == 0) f.moving = reaches_x2(problem, node);
  }
  for (Flow& f : flow) f.uniform = true;
  std::vector<int64_t> readers(y + 1, 0);
  flow[y].used = true;
  for (int64_t v = y; v > 0; --v) {
    const Node& node = problem.nodes[v - 1];
    Flow& f = flow[v];
    if (!f.used) continue;
    const bool linear = node.kind == node_linear;
    f.follows = node.kind < kinds && node.varies && node.input[0] == v - 1 && v > 1 &&
                problem.nodes[v - 2].kind == node_linear;
    f.viewed |= node.kind == node_concat;
    f.kept = problem.keeps_adjoint() && (f.moving || trains[v]);
    f.saved =
        linear && v < y && !(near[node.input[0]] && problem.width(node.input[0]) <= few_inputs);
    for (int64_t q = 0; q < node.inputs; ++q) {
      const int64_t u = node.input[q];
      flow[u].used = true;
      ++readers[u];
      flow[u].uniform &= f.uniform && !node.varies && node.kind != node_dropout;
      const bool kept = problem.keeps_adjoint() && u > 0 && (flow[u].moving || trains[u]);
      if (linear && kept && !f.uniform) flow[u].pulled = true;
      if (node.kind == node_columns) flow[u].viewed = true;
    }
  }
  for (int64_t v = 0; v <= y; ++v) flow[v].once = readers[v] == 1;
  find_parts(problem, found);
}

// Makes of what one node expects of a parameter what fits another too: of several widths that is one
// number for all columns, or nothing.
void fit(mk_parameter* parameter, const mk_parameter& other) {
  const auto may_be_one = [](const mk_parameter& p) { return p.one_for_all || p.columns == 1; };
  const bool one = may_be_one(*parameter) && may_be_one(other);
  if (parameter->columns != other.columns) parameter->columns = one ? 1 : -1;
  if (parameter->dimensions != other.dimensions || parameter->rows != other.rows) {
    parameter->columns = -1;
  }
  parameter->one_for_all &= other.one_for_all;
}

// What every parameter must be; several nodes may read it, and it must fit them all.
void find_parameters(OwnedProblem* owned) {
  const Problem& problem = owned->problem;
  owned->parameters.assign(problem.params, mk_parameter{});
  std::vector<char> seen(problem.params, false);
  int64_t layer = 0;
  for (const Node& node : owned->nodes) {
    layer += node.kind == node_linear;
    for (int64_t p = 0; p < node.params; ++p) {
      const bool linear = node.kind == node_linear, weight = linear && p == 0;
      const bool dropout = node.kind == node_dropout;
      mk_parameter parameter{};
      parameter.kind = node.kind;
      parameter.layer = linear ? layer : 0;
      parameter.dimensions = weight ? 2 : 1;
      parameter.rows = weight ? node.width : 0;
      parameter.columns = weight ? problem.width(node.input[0]) : dropout ? key_bytes : node.width;
      parameter.optional = linear && p == 1;
      parameter.one_for_all = !linear && !dropout;
      parameter.drawn = dropout;
      mk_parameter& found = owned->parameters[node.place[p]];
      if (seen[node.place[p]]) fit(&parameter, found);
      found = parameter;
      seen[node.place[p]] = true;
    }
  }
}

}  // namespace

void describe(OwnedProblem* owned, const int64_t* flags, int64_t d, int64_t k,
              const int64_t* columns, int64_t count, const int64_t* nodes, const double* numbers,
              const double* margin, const double* direction) {
  int64_t places = 0, all_numbers = 0, params = 0;
  const int64_t* at = nodes;
  for (int64_t i = 0; i < count; ++i) {
    places += at[2] + at[3];
    all_numbers += at[4];
    for (int64_t p = 0; p < at[3]; ++p) params = std::max(params, at[5 + at[2] + p] + 1);
    at += 5 + at[2] + at[3];
  }
  owned->places.reserve(places);
  owned->numbers.assign(numbers, numbers + all_numbers);
  at = nodes;
  int64_t taken = 0;
  for (int64_t i = 0; i < count; ++i) {
    Node node = traits(at[0]);
    node.width = at[1], node.inputs = at[2], node.params = at[3];
    node.numbers = owned->numbers.data() + taken;
    taken += at[4];
    node.input = owned->places.data() + owned->places.size();
    node.place = node.input + node.inputs;
    owned->places.insert(owned->places.end(), at + 5, at + 5 + node.inputs + node.params);
    owned->nodes.push_back(node);
    at += 5 + node.inputs + node.params;
  }
  Problem& problem = owned->problem;
  problem = Problem{};
  problem.d = d, problem.k = k, problem.count = count, problem.params = params;
  problem.D = owned->nodes.back().width;
  problem.nodes = owned->nodes.data();
  problem.adjoint = flags[1], problem.hinge = flags[2], problem.squared = flags[3];
  problem.elementwise = flags[4];
  owned->constrained.assign(columns, columns + k);
  find_runs(columns, k, &owned->runs);
  problem.columns = owned->constrained.data();
  problem.runs = owned->runs.data(), problem.run_count = int64_t(owned->runs.size());
  if (margin) owned->margin.assign(margin, margin + problem.D * k);
  if (direction) owned->direction.assign(direction, direction + problem.D * k);
  problem.margin = owned->margin.data();
  problem.direction = owned->direction.data();
  find_flow(problem, &owned->flow);
  problem.flow = owned->flow.data();
  find_parameters(owned);
  owned->shape = mk_shape{};
  owned->shape.d = d, owned->shape.D = problem.D, owned->shape.k = k, owned->shape.params = params;
  owned->shape.is_double = flags[0] != 0;
  owned->shape.summed = problem.hinge && !problem.elementwise;
  owned->shape.parameters = owned->parameters.data();
}

// The curve that is written at a place, which moves past it.
static Curve curve_at(const double*& at) {
  constexpr int64_t fixed = 6;  // numbers before the turns
  const Curve curve{{at[0], at[1]}, at[2], at[3], at[4], int64_t(at[5]), at + fixed};
  at += fixed + 3 * curve.turns;
  return curve;
}

void describe_box(OwnedProblem* owned, int64_t boxes, int64_t k, const double* ends,
                  const int64_t* columns, const double* direction, const double* middle,
                  double margin, const double* curves) {
  const Problem& problem = owned->problem;
  const double* end = curves;
  for (int64_t i = 0; i < 2 * problem.count; ++i) {
    if (problem.nodes[i / 2].kind < kinds) curve_at(end);
  }
  std::vector<double>& numbers = owned->box_numbers;
  numbers.assign(curves, end);
  numbers.insert(numbers.end(), ends, ends + 2 * boxes * problem.d);
  numbers.insert(numbers.end(), direction, direction + problem.D * k);
  numbers.insert(numbers.end(), middle, middle + k);
  const double* own = numbers.data();
  owned->curves.assign(2 * problem.count, Curve{});
  for (int64_t i = 0; i < 2 * problem.count; ++i) {
    if (problem.nodes[i / 2].kind < kinds) owned->curves[i] = curve_at(own);
  }
  owned->columns.assign(columns, columns + k);
  const double* signs = own + 2 * boxes * problem.d;
  owned->box = {
      boxes, k, own, signs, signs + problem.D * k, owned->columns.data(), owned->curves.data(),
      margin};
}

std::vector<ChainLayer> chain_of(int64_t layers, const mk_layer* chain) {
  std::vector<ChainLayer> each;
  for (int64_t l = 0; l < layers; ++l) {
    const mk_layer& from = chain[l];
    ChainLayer to{
        from.width, from.out,   from.kind,   {from.numbers[0], from.numbers[1], from.numbers[2]},
        {},         from.third, from.fourth, from.W,
        from.b};
    const double* at = from.curves;
    for (int order = 0; at && order < 3; ++order) to.curve[order] = curve_at(at);
    each.push_back(to);
  }
  return each;
}

std::vector<Way> way_down(const Problem& problem, bool input, const void* const* grads) {
  const int64_t y = problem.count;
  std::vector<Way> way(y + 1, Way{});
  way[0].wanted = input;
  for (int64_t v = 1; v <= y; ++v) {
    const Node& node = problem.nodes[v - 1];
    for (int64_t p = 0; p < node.params; ++p) way[v].trained |= grads[node.place[p]] != nullptr;
    way[v].wanted = way[v].trained;
    for (int64_t q = 0; q < node.inputs; ++q) way[v].wanted |= way[node.input[q]].wanted;
  }
  for (int64_t v = y; v > 0; --v) {
    const Node& node = problem.nodes[v - 1];
    const Flow& flow = problem.flow[v];
    Way& w = way[v];
    if (!flow.used) continue;
    if (w.wanted && flow.moving && (w.trained || node.curved)) {
      for (int64_t q = 0; q < node.inputs; ++q) way[node.input[q]].dot = true;
    }
    if (w.dot && flow.moving) {
      for (int64_t q = 0; q < node.inputs; ++q) way[node.input[q]].dot = true;
    }
    w.dot &= flow.moving;
    w.first = node.varies && (w.wanted || w.dot);
    if (w.first && node.reads_v) w.value = true;
    const bool again = w.value && !flow.saved;
    if (w.first || again || (w.wanted && w.trained)) {
      for (int64_t q = 0; q < node.inputs; ++q) way[node.input[q]].value = true;
    }
  }
  return way;
}
