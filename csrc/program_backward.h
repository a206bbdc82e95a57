// The backward pass of a program: gradients of (y, J or its penalty) by parameters and x.
//
// The part of a slope in the loss is sᵀ·J·ẋ for a pair (row, tangent ẋ, seed s); only pairs that are
// not zero are there at all. Their tangents are pushed up the program and their seeds pulled down it;
// each node adds what its parameters do to a slope, and its curvature joins the cotangent g of the
// row. With one output in adjoint mode the seed's chain P of every row is known from the forward and
// g = gy∘P + q, q the chain of the curvature alone: rows without a violation cost no product with W.
#pragma once

#include "program_forward.h"

namespace {

// Where each parameter's gradient lies among one thread's sums. W (out, in) is kept transposed where
// that fills vectors better, and where x is one of the factors, whose rows are not whole vectors.
template <class T> struct GradientLayout {
  struct Place {
    int64_t at, out, in;  // a row of `in` where out is 0
    bool transposed;
    int64_t rows() const { return out == 0 ? 1 : transposed ? in : out; }
    int64_t columns() const { return out && transposed ? out : in; }
    int64_t ld() const { return whole_vectors<T>(columns()); }
  };
  Place* place;
  int64_t size;

  GradientLayout(Bump& memory, const Plan& plan, const int64_t* sizes)
      : place(memory.take<Place>(plan.params)), size(0) {
    if (!place) return;
    for (int64_t p = 0; p < plan.params; ++p) place[p] = Place{0, 0, 0, false};
    for (int64_t i = 0; i < plan.count; ++i) {
      const Node& node = plan.nodes[i];
      for (int64_t nth = 0; nth < node.params; ++nth) {
        Place& to = place[node.place[nth]];
        if (node.kind != node_linear || nth == 1) {
          if (node.kind != node_dropout) to.in = sizes[node.place[nth]] == 1 ? 1 : node.width;
          continue;
        }
        to.out = node.width, to.in = plan.width(node.input[0]);
        const int64_t lanes = Simd<T>::lanes;
        to.transposed |= node.input[0] == 0 || to.in * ((to.out + lanes - 1) / lanes) <
                                                   to.out * ((to.in + lanes - 1) / lanes);
      }
    }
    for (int64_t p = 0; p < plan.params; ++p) {
      place[p].at = size;
      size += place[p].rows() * place[p].ld();
    }
    size = round_up(size + int64_t(gap / sizeof(T)), 64);
  }
};

// What a backward needs of its way beyond the flags by value.
struct Errand {
  bool pairs;   // some slope takes part in the loss
  bool curved;  // and some node on the way bends
};

template <class T> struct ProgramBackwardWeights {
  Program<T> net;

  ProgramBackwardWeights(const Plan& plan, const BackwardCall& call, const Errand& errand,
                         Bump& memory)
      : net(plan, call.params, call.sizes, memory) {
    for (int64_t v = 1; v <= net.y; ++v) {
      const Way& way = call.way[v];
      if (!net.flow(v).used || !(way.wanted || way.dot || way.value)) continue;
      net.pack_parameter(memory, v);
      if (!net.linear(v)) continue;
      const bool again = way.value && !net.flow(v).saved;
      const bool pushed = errand.pairs && way.dot;
      if (again) net.pack_bias(memory, v);
      const bool top = v == net.y && net.flow(v).kept;
      if (top || ((again || pushed) && net.by_dots(v))) net.pack_rows(memory, v);
      if ((again || pushed) && !net.by_dots(v)) net.pack_forward(memory, v);
      if (way.wanted && pulls(call, errand, v)) net.pack_back(memory, v);
    }
  }

 private:
  // Whether something is multiplied by W on the way down from v.
  bool pulls(const BackwardCall& call, const Errand& errand, int64_t v) const {
    const int64_t u = net.below(v);
    if (!call.way[u].wanted) return false;
    if (!net.flow(u).kept) return true;
    return (errand.pairs && errand.curved) || (!net.flow(u).pulled && v != net.y);
  }
};

template <class T> struct ProgramBackwardScratch {
  BlockValues<T> rows;
  // By value. Of the rows: P where it is kept, else g. σ'' of the rows or of the pairs. Of the pairs:
  // the tangent, and what comes down for them: q where P is kept, else P.
  Mat<T> *cotangent, *second, *dot, *chain;
  // done: of an elementwise node, the rows' cotangent has gone on to its input already; of a linear
  // one, it is gy∘P, and P of the pairs in `seeds`. through: what came down for the pairs has gone on.
  bool *begun, *done, *chained, *prepared, *through;
  Mat<const T>* dots;  // of the inputs of the node at hand
  Mat<T> g, seeds, bend;  // a block of the widest value each
  T* slopes;           // gJ (rows, D, k)
  Pairs<T> pairs;
  T* sums = nullptr;

  ProgramBackwardScratch(Bump& memory, const Program<T>& net, const BackwardCall& call,
                         const Errand& errand, int64_t capacity)
      : rows(memory, net, capacity,
             [&](int64_t v, ValuePart part) {
               const Way& way = call.way[v];
               if (v == 0) return part == the_value && !net.x_as_it_is();
               if (!net.flow(v).used) return false;
               if (part == the_mask) return is_mask(net, call, v);
               if (part == the_first) return way.first && needs_first(net.node(v));
               return way.value && !net.flow(v).saved && !net.is_view(v);
             }),
        pairs(memory, *net.plan, errand.pairs ? capacity : 0) {
    const int64_t count = net.y + 1;
    Mat<T>** const lists[] = {&cotangent, &second, &dot, &chain};
    for (Mat<T>** list : lists) *list = memory.take<Mat<T>>(count);
    bool** const flags[] = {&begun, &done, &chained, &prepared, &through};
    for (bool** list : flags) *list = memory.take<bool>(count);
    int64_t most = 1, widest = 1;
    for (int64_t v = 0; v < count; ++v) {
      if (v) most = max_of(most, net.node(v).inputs);
      widest = max_of(widest, net.width(v));
      const Way& way = call.way[v];
      const Flow& flow = net.flow(v);
      const int64_t ld = scratch_ld<T>(net.width(v)), size = capacity * ld;
      const bool one_row = flow.kept && flow.uniform;
      const auto take = [&](bool wanted, int64_t n) {
        return Mat<T>{wanted ? memory.take<T>(n) : nullptr, ld};
      };
      Mat<T> own = take(flow.used && way.wanted && !flow.pulled && !flow.part, one_row ? ld : size);
      if (one_row) own.ld = 0;
      const bool bends = v && flow.used && way.first && is_elementwise(net.node(v).kind) &&
                         net.node(v).curved;
      const Mat<T> bent = take(errand.pairs && bends, size);
      const Mat<T> tangent = take(errand.pairs && flow.used && way.dot && !net.is_view(v), size);
      const Mat<T> down = take(errand.pairs && flow.used && way.wanted && !flow.part &&
                                (flow.kept ? errand.curved : flow.moving),
                            size);
      if (!cotangent) continue;
      cotangent[v] = flow.part ? net.view_of(cotangent, v) : own;
      chain[v] = flow.part ? net.view_of(chain, v) : down;
      dot[v] = net.is_view(v) ? net.view_of(dot, v) : tangent;
      second[v] = bent;
    }
    dots = memory.take<Mat<const T>>(most);
    Mat<T>* const blocks[] = {&g, &seeds, &bend};
    for (Mat<T>* block : blocks) {
      block->ld = scratch_ld<T>(widest);
      block->at = memory.take<T>(capacity * block->ld);
    }
    slopes = memory.take<T>(capacity * net.D * net.k);
  }
  static bool is_mask(const Program<T>& net, const BackwardCall& call, int64_t v) {
    const Way& way = call.way[v];
    return net.node(v).kind == node_dropout && (way.wanted || way.dot || way.value);
  }
};

template <class T> struct ProgramBackward {
  typedef ProgramBackwardScratch<T> Scratch;

  const Program<T>& net;
  const BackwardCall& call;
  const Blocks& blocks;
  const Errand& errand;
  const GradientLayout<T>& layout;

  struct Runs {
    const Run *first, *last;
    const Run* begin() const { return first; }
    const Run* end() const { return last; }
  };
  Runs runs() const { return {net.plan->runs, net.plan->runs + net.plan->run_count}; }
  const Way& way(int64_t v) const { return call.way[v]; }
  const Flow& flow(int64_t v) const { return net.flow(v); }
  bool wants(int64_t place) const { return call.grads[place] != nullptr; }

  void run(const Scratch& scratch, int64_t block) const {
    const int64_t rows = blocks.rows(block), row0 = blocks.begin(block);
    const bool active =
        errand.pairs && slope_gradients(*net.plan, call, scratch.slopes, rows, row0);
    if (!active && !call.gy) return give_input(scratch, rows, row0, false);
    const int64_t candidates = rows * (net.plan->adjoint ? net.D : net.k);
    // σ'' is computed with σ' for every row where many are wanted, else for each pair by itself.
    const bool bends = active && 4 * count(scratch.slopes, candidates) > rows;
    begin(scratch, block, rows, row0);
    values(scratch, block, rows, row0, active, bends);
    int64_t next = active ? 0 : candidates;
    for (;;) {  // the last pairs go together with the rows
      const int64_t m = next < candidates
                            ? scratch.pairs.gather(*net.plan, scratch.slopes, rows,
                                                   blocks.capacity, &next)
                            : 0;
      const bool all = m == rows && net.plan->keeps_adjoint();
      const Pass pass{scratch, rows, row0, m, all ? nullptr : scratch.pairs.row, bends};
      if (m) tangents(pass);
      walk(pass, next == candidates);
      if (next == candidates) break;
    }
    give_input(scratch, rows, row0, true);
  }

 private:
  // One walk: `m` pairs of a block.
  struct Pass {
    const Scratch& scratch;
    int64_t rows, row0, m;
    const int32_t* index;  // the pairs' rows; null where every row is a pair, in its place
    bool bends;            // σ'' of every row is there

    // The pairs' rows of what all rows have.
    Mat<const T> of_pairs(Mat<const T> x) const { return {x.at, x.ld, index}; }
  };

  // How many pairs of gJ there are.
  int64_t count(const T* gJ, int64_t candidates) const {
    if (net.plan->adjoint && net.D == 1) {
      int64_t n = 0;
      for (int64_t i = 0; i < candidates; ++i) {
        bool any = false;
        for (int64_t c = 0; c < net.k; ++c) any |= gJ[i * net.k + c] != T(0);
        n += any;
      }
      return n;
    }
    int64_t n = 0;  // of several outputs the entries, which are as many or more
    for (int64_t i = 0; i < candidates * (net.plan->adjoint ? net.k : net.D); ++i) n += gJ[i] != T(0);
    return n;
  }

  void give_input(const Scratch& scratch, int64_t rows, int64_t row0, bool walked) const {
    if (!call.gx) return;
    T* to = static_cast<T*>(call.gx) + row0 * net.d;
    if (!walked || !scratch.begun[0]) return clear(to, rows * net.d);
    for (int64_t i = 0; i < rows; ++i) copy(to + i * net.d, scratch.cotangent[0].row(i), net.d);
  }

  // --- the block's rows ---------------------------------------------------------------------------

  void values(const Scratch& scratch, int64_t block, int64_t rows, int64_t row0, bool active,
              bool bends) const {
    const BlockValues<T>& at = scratch.rows;
    const SavedProgram<T> saved{net, blocks};
    at.read_x(net, call.x, rows, row0, net.x_as_it_is());
    for (int64_t v = 1; v <= net.y; ++v) {
      if (!flow(v).used) continue;
      const Node& node = net.node(v);
      if (Scratch::is_mask(net, call, v)) at.draw_mask(net, v, rows, row0);
      if (flow(v).saved) {
        at.value[v] = saved.value(call.saved[0], block, v);
      } else if (net.is_view(v)) {
        if (way(v).value) at.value[v] = net.view_of(at.value, v);
      } else if (net.linear(v)) {
        if (!way(v).value) continue;
        const bool next = net.followed(v) && (way(v + 1).value || at.first[v + 1]);
        if (next && !(bends && scratch.second[v + 1]) && !scales_ahead(v + 1)) {
          const ApplySigma<T> after(net.node(v + 1), at.value[v], at.value[v + 1], at.first[v + 1]);
          linear_value<T>(net, v, rows, at.value[net.below(v)], at.value[v], after);
          ++v;
        } else {
          linear_value<T>(net, v, rows, at.value[net.below(v)], at.value[v], Nothing{});
        }
      } else if (scales_ahead(v) && !(bends && scratch.second[v])) {
        value_and_scale(scratch, rows, row0, v, active);
      } else if (bends && scratch.second[v]) {
        const Operands<T> o = at.operands(net, v, rows);
        const Mat<T> second = scratch.second[v];
        const Numbers<T> numbers{o.number(0), o.number(1), o.number(2)};
        orders_of<T>(int(node.kind))[at.value[v] ? all_orders : derivatives](
            {rows, o.columns, o.u[0].at, o.u[0].ld, at.value[v].at, at.first[v].at, second.at,
             second.ld},
            numbers);
      } else if (way(v).value || at.first[v]) {
        node_value<T>(at.operands(net, v, rows), at.value[v], at.first[v]);
      }
    }
  }

  // The cotangent of y, and those that forward left.
  void begin(const Scratch& scratch, int64_t block, int64_t rows, int64_t row0) const {
    const SavedProgram<T> saved{net, blocks};
    for (int64_t v = 0; v <= net.y; ++v) {
      scratch.begun[v] = scratch.done[v] = false;
      if (!flow(v).pulled) continue;
      scratch.cotangent[v] = saved.cotangent(call.saved[1], block, v);
      scratch.begun[v] = true;
    }
    if (!way(net.y).wanted) return;
    const Mat<T> top = scratch.cotangent[net.y];
    if (flow(net.y).kept) {
      for (int64_t j = 0; j < net.whole(net.y); ++j) top.at[j] = T(1);
    } else if (call.gy) {
      const T* gy = static_cast<const T*>(call.gy) + row0 * net.D;
      for (int64_t i = 0; i < rows; ++i) copy_few(top.row(i), gy + i * net.D, net.D);
    } else {
      return;
    }
    scratch.begun[net.y] = true;
  }

  int64_t rows_of(const Pass& pass, int64_t v) const {
    return pass.scratch.cotangent[v].ld ? pass.rows : 1;
  }

  // --- pairs --------------------------------------------------------------------------------------

  Mat<const T> gather(const Pass& pass, Mat<const T> from, int64_t columns, Mat<T> to) const {
    put(pass.m, columns, to, false, Itself{},
        Mat<const T>{from.at, from.ld, pass.scratch.pairs.row});
    return to;
  }
  void scatter_add(const Pass& pass, Mat<const T> from, int64_t columns, Mat<T> to) const {
    const int32_t* row = pass.scratch.pairs.row;
    for (int64_t i = 0; i < pass.m; ++i) {
      const T* x = from.row(i);
      T* at = to.row(row[i]);
      for (int64_t j = 0; j < columns; j += Simd<T>::lanes) {
        store(at + j, load(at + j) + load(x + j));
      }
    }
  }

  // What a node that is not linear is computed from, for the pairs.
  Operands<T> operands(const Pass& pass, int64_t v) const {
    const Scratch& scratch = pass.scratch;
    const Node& node = net.node(v);
    Operands<T> o = scratch.rows.operands(net, v, pass.m);
    for (int64_t nth = 0; nth < node.inputs; ++nth) scratch.rows.inputs[nth].index = pass.index;
    o.v.index = o.first.index = pass.index;
    if (node.kind == node_dropout) o.parameter.index = pass.index;
    o.second = scratch.second[v];
    if (!o.second) return o;
    if (pass.bends) {
      o.second.index = pass.index;
    } else if (!scratch.prepared[v]) {
      const Numbers<T> numbers{o.number(0), o.number(1), o.number(2)};
      for (int64_t i = 0; i < pass.m; ++i) {  // σ' goes to the side
        orders_of<T>(int(node.kind))[derivatives]({1, o.columns, o.u[0].row(i), 0, nullptr, scratch.bend.at,
                                         scratch.second[v].row(i), 0},
                                        numbers);
      }
      scratch.prepared[v] = true;
    }
    return o;
  }

  // The tangents of the inputs of v's node; false if there is none.
  bool dots_of(const Pass& pass, int64_t v) const {
    const Node& node = net.node(v);
    bool any = false;
    for (int64_t nth = 0; nth < node.inputs; ++nth) {
      const int64_t u = node.input[nth];
      const bool moves = flow(u).moving && way(u).dot;
      pass.scratch.dots[nth] = moves ? Mat<const T>(pass.scratch.dot[u]) : Mat<const T>{};
      any |= moves;
    }
    return any;
  }

  void tangents(const Pass& pass) const {
    const Scratch& scratch = pass.scratch;
    for (int64_t v = 0; v <= net.y; ++v) scratch.prepared[v] = scratch.chained[v] = scratch.through[v] = false;
    if (way(0).dot) {
      for (int64_t i = 0; i < pass.m; ++i) {
        T* x = scratch.dot[0].row(i);
        clear(x, net.whole(0));
        for (int64_t c = 0; c < net.k; ++c) {
          x[net.plan->columns[c]] = scratch.pairs.dot[i * scratch.pairs.ld_dot + c];
        }
      }
    }
    for (int64_t v = 1; v <= net.y; ++v) {
      if (!flow(v).used || !way(v).dot || net.is_view(v)) continue;
      if (!net.linear(v)) {
        const Operands<T> o = operands(pass, v);
        dots_of(pass, v);
        node_push<T>(o, scratch.dots, scratch.dot[v]);
      } else if (net.below(v) && net.followed(v) && way(v + 1).dot) {
        const ApplySlope<T> after{operands(pass, v + 1).first, scratch.dot[v], scratch.dot[v + 1], false};
        linear_push<T>(net, v, pass.m, scratch.dot[net.below(v)], nullptr, scratch.dot[v], after);
        ++v;
      } else if (net.below(v)) {
        linear_push<T>(net, v, pass.m, scratch.dot[net.below(v)], nullptr, scratch.dot[v], Nothing{});
      } else {
        const Mat<T> to = scratch.dot[v];
        for (const Run& run : runs()) {
          const Init<T> init = run.at ? Init<T>{to.at, to.ld} : from_zero<T>();
          gemm<false>(pass.m, run.count, scratch.pairs.dot + run.at, scratch.pairs.ld_dot, net.at(v).forward,
                      run.first, init, to.at, to.ld, Nothing{});
        }
      }
    }
    if (!flow(net.y).kept && flow(net.y).moving && way(net.y).wanted) {
      for (int64_t i = 0; i < pass.m; ++i) {
        copy_few(scratch.chain[net.y].row(i), scratch.pairs.seed + i * scratch.pairs.ld_seed, net.D);
      }
      scratch.chained[net.y] = true;
    }
  }

  // The pairs' own P of value v, if x2 reaches it.
  Mat<const T> seeds(const Pass& pass, int64_t v) const {
    const Scratch& scratch = pass.scratch;
    if (!pass.m || !flow(v).moving) return {};
    if (!flow(v).kept) return scratch.chained[v] ? Mat<const T>(scratch.chain[v]) : Mat<const T>{};
    if (!net.linear(v)) return pass.of_pairs(scratch.cotangent[v]);
    if (scratch.done[v]) return scratch.seeds;  // by pull_and_scale
    if (!pass.index && scratch.cotangent[v].ld) return scratch.cotangent[v];
    return gather(pass, scratch.cotangent[v], net.whole(v), scratch.seeds);
  }

  // --- the walk down ------------------------------------------------------------------------------

  void walk(const Pass& pass, bool with_rows) const {
    const Scratch& scratch = pass.scratch;
    for (int64_t v = net.y; v > 0; --v) {
      if (!flow(v).used || !way(v).wanted) continue;
      if (flow(v).parted) {
        if (pass.m) join(v, pass.m, scratch.chain, scratch.chained);
        if (with_rows) join(v, rows_of(pass, v), scratch.cotangent, scratch.begun);
      }
      if (flow(v).part) continue;
      const bool slopes = way(v).trained || net.node(v).curved;
      const Mat<const T> P = slopes ? seeds(pass, v) : Mat<const T>{};
      const Mat<const T> down =
          pass.m && scratch.chained[v] ? Mat<const T>(scratch.chain[v]) : Mat<const T>{};
      if (!net.linear(v) && pass.m && !scratch.through[v]) pairs_light(pass, v, P, down);
      const Mat<const T> G = with_rows ? row_gradient(pass, v, down) : Mat<const T>{};
      if (net.linear(v)) {
        if (way(v).trained) linear_gradients(pass, v, P, G);
        if (with_rows) rows_linear(pass, v, G);
        if (down && by_pairs(net.below(v))) pull_pairs(pass, v, down);
      } else if (with_rows && !scratch.done[v]) {
        rows_light(pass, v, G);
      }
    }
  }

  // What has come down to the parts of value u is what came down to u; to some perhaps nothing did.
  void join(int64_t u, int64_t rows, Mat<T>* at, bool* begun) const {
    const auto is_part = [&](int64_t v) { return flow(v).part && net.node(v).input[0] == u; };
    for (int64_t v = u + 1; v <= net.y; ++v) begun[u] |= is_part(v) && begun[v];
    for (int64_t v = u + 1; begun[u] && v <= net.y; ++v) {
      if (is_part(v) && !begun[v]) clear_rows(rows, net.whole(v), at[v]);
    }
  }

  // Whether what comes down for the pairs goes on to value u.
  bool by_pairs(int64_t u) const {
    return way(u).wanted && (flow(u).kept || (u > 0 && flow(u).moving));
  }
  // Whether the rows' gradient goes to u by itself, not as gy∘P + q.
  bool direct(int64_t u) const { return way(u).wanted && !flow(u).kept; }
  // Whether P goes on to u: not where forward left it.
  bool passes(int64_t u) const { return way(u).wanted && flow(u).kept && !flow(u).pulled; }

  void pull_pairs(const Pass& pass, int64_t v, Mat<const T> down) const {
    const Scratch& scratch = pass.scratch;
    const int64_t u = net.below(v);
    if (net.pulls_through(u) && pull_through(pass, v, down)) return;
    linear_pull<T>(net, v, pass.m, down, scratch.chain[u], scratch.chained[u], Nothing{});
    scratch.chained[u] = true;
  }

  // σ'∘down + σ''∘u̇∘P.
  struct PullAndBend {
    template <class V> MK_INLINE V operator()(V first, V down, V second, V dot, V P) const {
      return first * down + second * dot * P;
    }
  };

  // After a product gave a tile of what comes down for the pairs to an elementwise node: its pull and
  // its curvature, while the tile is in the first-level cache.
  struct PullPairs {
    Mat<const T> first, second, dot, P;  // second null: no curvature; P null: the product itself
    Mat<const T> x;           // the product
    Mat<T> to;                // null: nothing goes on; else perhaps x itself
    bool add;
    Mat<T> rows;              // whose cotangent gets the curvature; null: it goes on with the pull
    const int32_t* row;

    void operator()(int64_t i0, int64_t count, int64_t j0, int64_t columns) const {
      for (int64_t i = i0; i < i0 + count; ++i) {
        const auto of = [&](const Mat<const T>& a) { return a.row(i) + j0; };
        T* on = to ? to.row(i) + j0 : nullptr;
        if (second && !rows) {
          put_row<T>(columns, on, add, PullAndBend{}, of(first), of(x), of(second), of(dot), of(P));
          continue;
        }
        if (second) {
          put_row<T>(columns, rows.row(row[i]) + j0, true, TimesThree{}, of(second), of(dot), of(x));
        }
        if (on) put_row<T>(columns, on, add, Times{}, of(first), of(x));
      }
    }
  };

  // The pairs' pull of linear node v and of the elementwise node of its input, in one pass.
  bool pull_through(const Pass& pass, int64_t v, Mat<const T> down) const {
    const Scratch& scratch = pass.scratch;
    const int64_t u = net.below(v), b = net.node(u).input[0];
    const bool kept = flow(u).kept;
    if (kept != flow(b).kept) return false;
    const Operands<T> o = operands(pass, u);
    const bool bends = net.node(u).curved && dots_of(pass, u) && way(b).wanted;
    PullPairs after{};
    after.first = o.first;
    if (by_pairs(b)) after.to = scratch.chain[b], after.add = scratch.chained[b];
    if (bends) {
      after.second = o.second, after.dot = scratch.dots[0];
      if (kept) after.P = pass.of_pairs(scratch.cotangent[u]);
      if (!kept) {
        start(scratch.cotangent, scratch.begun, b, pass.rows);
        after.rows = scratch.cotangent[b], after.row = scratch.pairs.row;
      }
    }
    const Mat<T> product = after.to && !after.add ? after.to : scratch.chain[u];
    after.x = product;
    linear_pull<T>(net, v, pass.m, down, product, false, after);
    scratch.through[u] = true;
    scratch.chained[b] |= bool(after.to);
    return true;
  }

  void pairs_light(const Pass& pass, int64_t v, Mat<const T> P, Mat<const T> down) const {
    const Scratch& scratch = pass.scratch;
    const Node& node = net.node(v);
    if (!P && !down) return;
    const Operands<T> o = operands(pass, v);
    const bool moves = dots_of(pass, v) && P;
    if (moves && way(v).trained && wants(node.place[0])) {
      add_parameter(v, [&](T* sums) { node_slope_parameters<T>(o, scratch.dots[0], P, sums); }, scratch);
    }
    if (is_elementwise(node.kind) && node.curved) return pairs_curved(pass, o, P, down, moves);
    for (int64_t nth = 0; nth < node.inputs; ++nth) {
      const int64_t u = node.input[nth];
      if (down && by_pairs(u)) {
        if (node.kind == node_columns) start(scratch.chain, scratch.chained, u, pass.m);
        node_pull<T>(o, down, nth, scratch.chain[u], scratch.chained[u]);
        scratch.chained[u] = true;
      }
      if (!moves || !way(u).wanted || !node_bends(node, scratch.dots, nth)) continue;
      if (flow(u).kept) {
        node_curvature<T>(o, scratch.dots, P, nth, scratch.chain[u], scratch.chained[u]);
        scratch.chained[u] = true;
      } else {
        const Mat<T> bend{scratch.bend.at, scratch_ld<T>(net.width(u))};
        node_curvature<T>(o, scratch.dots, P, nth, bend, false);
        start(scratch.cotangent, scratch.begun, u, pass.rows);
        scatter_add(pass, bend, net.whole(u), scratch.cotangent[u]);
      }
    }
  }

  // An elementwise node that bends: its pull and its curvature in one pass.
  void pairs_curved(const Pass& pass, const Operands<T>& o, Mat<const T> P, Mat<const T> down,
                    bool moves) const {
    const Scratch& scratch = pass.scratch;
    const int64_t u = o.node->input[0], m = pass.m, columns = o.columns;
    const bool pulls = down && by_pairs(u), bends = moves && way(u).wanted;
    const Mat<const T> dot = scratch.dots[0];
    if (pulls && bends && flow(u).kept) {
      put(m, columns, scratch.chain[u], scratch.chained[u], PullAndBend{}, o.first, down, o.second, dot, P);
    } else if (bends && flow(u).kept) {
      put(m, columns, scratch.chain[u], scratch.chained[u], TimesThree{}, o.second, dot, P);
    } else if (pulls) {
      put(m, columns, scratch.chain[u], scratch.chained[u], Times{}, o.first, down);
    }
    if (pulls || (bends && flow(u).kept)) scratch.chained[u] = true;
    if (!bends || flow(u).kept) return;
    start(scratch.cotangent, scratch.begun, u, pass.rows);
    for (int64_t i = 0; i < m; ++i) {
      put_row<T>(columns, scratch.cotangent[u].row(scratch.pairs.row[i]), true, TimesThree{}, o.second.row(i),
                 dot.row(i), P.row(i));
    }
  }

  // `add(row)` adds the gradient of v's parameter to a row of as many columns. One number for all
  // columns may be that of nodes of several widths, and gets their sum.
  template <class Add> void add_parameter(int64_t v, const Add& add, const Scratch& scratch) const {
    const int64_t place = net.node(v).place[0], n = net.width(v);
    T* to = scratch.sums + layout.place[place].at;
    if (call.sizes[place] != 1 || n == 1) return add(to);
    clear(scratch.bend.at, net.whole(v));
    add(scratch.bend.at);
    *to += total<T>(n, [&](int64_t j) { return load(scratch.bend.at + j); });
  }

  // Zeros for what is added to piece by piece.
  void start(Mat<T>* at, bool* begun, int64_t u, int64_t rows) const {
    if (!begun[u]) clear_rows(rows, net.whole(u), at[u]);
    begun[u] = true;
  }

  // Where the gradient of a linear node's bias is added up; null if nobody wants it.
  T* bias_of(const Scratch& scratch, int64_t v) const {
    if (!net.linear(v) || !wants(net.node(v).place[1])) return nullptr;
    return scratch.sums + layout.place[net.node(v).place[1]].at;
  }

  // g of the rows at value v, where somebody wants it, and what a bias gets of it.
  Mat<const T> row_gradient(const Pass& pass, int64_t v, Mat<const T> down) const {
    const Scratch& scratch = pass.scratch;
    T* bias = bias_of(scratch, v);
    if (!flow(v).kept) {
      if (!scratch.begun[v]) return {};
      const Mat<const T> g = scratch.cotangent[v];
      if (bias) add_columns<T>(pass.rows, net.whole(v), bias, [&](int64_t i, int64_t j) {
          return load(g.row(i) + j);
        });
      return g;
    }
    bool wanted = way(v).trained;
    for (int64_t i = 0; i < net.node(v).inputs; ++i) wanted |= direct(net.node(v).input[i]);
    if (!wanted || (!call.gy && !down)) return {};
    const Mat<const T> P = scratch.cotangent[v];
    const bool scaled = net.linear(v) && scratch.done[v];
    const Mat<T> g = scaled ? scratch.cotangent[v] : Mat<T>{scratch.g.at, scratch_ld<T>(net.width(v))};
    if (call.gy && !scaled) {
      const T* gy = static_cast<const T*>(call.gy) + pass.row0;
      add_columns<T>(pass.rows, net.whole(v), bias, [&](int64_t i, int64_t j) {
        const Vec<T> x = gy[i] * load(P.row(i) + j);
        store(g.row(i) + j, x);
        return x;
      });
    } else if (!call.gy) {
      clear(g.at, pass.rows * g.ld);
    }
    if (down) {
      scatter_add(pass, down, net.whole(v), g);
      if (bias) add_columns<T>(pass.m, net.whole(v), bias, [&](int64_t i, int64_t j) {
          return load(down.row(i) + j);
        });
    }
    return g;
  }

  // Whether the linear node before the elementwise one of v has a P that nobody reads but its own
  // gradients: then gy∘P takes its place.
  bool scales(int64_t v) const {
    const int64_t b = v - 1;
    return flow(v).follows && passes(b) && flow(b).once && way(b).trained && call.gy &&
           !direct(net.below(b));
  }
  // And whether P of value v is known beforehand.
  bool scales_ahead(int64_t v) const {
    return scales(v) && way(v).value && (flow(v).pulled || below_top(v));
  }
  // Whether P of v is the one row of the last node, a linear one.
  bool below_top(int64_t v) const {
    return net.linear(net.y) && net.below(net.y) == v && flow(v).once && flow(net.y).kept;
  }

  // The value, σ' where pairs want it, and gy∘P of the linear node before, in one pass.
  void value_and_scale(const Scratch& scratch, int64_t rows, int64_t row0, int64_t v,
                       bool active) const {
    const Node& node = net.node(v);
    const BlockValues<T>& at = scratch.rows;
    const Mat<const T> a = at.value[v - 1], P = below_top(v)
                                                    ? Mat<const T>{net.at(net.y).rows, 0}
                                                    : Mat<const T>(scratch.cotangent[v]);
    const Mat<T> value = at.value[v];
    const T* gy = static_cast<const T*>(call.gy) + row0;
    singles_of<T>(int(node.kind))[active](
        {rows, net.whole(v), a.at, a.ld, P.at, P.ld, gy, value.at, at.first[v].at,
         scratch.cotangent[v - 1].at, value.ld, bias_of(scratch, v - 1)},
        {T(node.numbers[0]), T(node.numbers[1]), T(node.numbers[2])});
    scratch.begun[v - 1] = scratch.done[v - 1] = true;
  }

  // From the elementwise node of v to the linear one before it: gy∘P of the rows, if it is not there
  // yet, and P of the pairs. Whether that is all there is to do.
  bool pull_and_scale(const Pass& pass, int64_t v) const {
    if (!scales(v)) return false;
    const Scratch& scratch = pass.scratch;
    const int64_t b = v - 1;
    const Mat<const T> P = scratch.cotangent[v], first = scratch.rows.first[v];
    const Mat<T> g = scratch.cotangent[b];
    const T* gy = static_cast<const T*>(call.gy) + pass.row0;
    if (!scratch.done[b]) {
      add_columns<T>(pass.rows, net.whole(b), bias_of(scratch, b), [&](int64_t i, int64_t j) {
        const Vec<T> x = gy[i] * (load(first.row(i) + j) * load(P.row(i) + j));
        store(g.row(i) + j, x);
        return x;
      });
    }
    const int32_t* row = scratch.pairs.row;
    put(flow(b).moving ? pass.m : 0, net.whole(b), scratch.seeds, false, Times{},
        Mat<const T>{first.at, first.ld, row}, Mat<const T>{P.at, P.ld, row});
    scratch.begun[b] = scratch.done[b] = true;
    return true;
  }

  // dW += Pᵀ·u̇ of the pairs and gᵀ·u of the rows. Either may be missing.
  void linear_gradients(const Pass& pass, int64_t v, Mat<const T> P, Mat<const T> G) const {
    const Scratch& scratch = pass.scratch;
    const Node& node = net.node(v);
    const int64_t u = net.below(v);
    if (!wants(node.place[0])) return;
    const typename GradientLayout<T>::Place& place = layout.place[node.place[0]];
    T* to = scratch.sums + place.at;
    const Mat<const T> rows = scratch.rows.value[u];
    if (P && u == 0) {  // the tangent of x is ẋ in the columns of x2 and nothing elsewhere
      for (const Run& run : runs()) {
        product(run.count, pass.m, {scratch.pairs.dot + run.at, scratch.pairs.ld_dot}, P, net.width(v),
                to + run.first * place.ld(), place.ld(), {});
      }
    }
    const bool slopes = P && u > 0 && flow(u).moving;
    if (!G && !slopes) return;
    const Mat<const T> dots = slopes ? Mat<const T>(scratch.dot[u]) : Mat<const T>{};
    const Mat<const T> left = place.transposed ? rows : G, right = place.transposed ? G : rows;
    const Mat<const T> left2 = place.transposed ? dots : P, right2 = place.transposed ? P : dots;
    const int64_t M = place.rows(), N = place.columns();
    if (!G || (slopes && !switches.stacks)) {
      product(M, pass.m, left2, right2, N, to, place.ld(), {});
    }
    if (!G) return;
    More<T> more{};
    if (slopes && switches.stacks) more = {pass.m, left2.at, left2.ld, right2.at, right2.ld};
    product(M, pass.rows, left, right, N, to, place.ld(), more);
  }
  // to (M, N) += leftᵀ·right over K rows.
  void product(int64_t M, int64_t K, Mat<const T> left, Mat<const T> right, int64_t N, T* to,
               int64_t ld, const More<T>& more) const {
    if (M == 1) {  // a tile of one row would be one long chain of sums
      const auto row = [](Mat<const T> a, Mat<const T> x) {
        return [=](int64_t i, int64_t j) { return a.row(i)[0] * load(x.row(i) + j); };
      };
      add_columns<T>(K, whole_vectors<T>(N), to, row(left, right));
      add_columns<T>(more.K, whole_vectors<T>(N), to,
                     row({more.a, more.lda}, {more.b, more.ldb}));
      return;
    }
    const Matrix<T> b{right.at, K, N, right.ld};
    gemm<true>(M, K, left.at, left.ld, b, 0, from_zero<T>(), to, ld, Nothing{}, more);
  }

  void rows_linear(const Pass& pass, int64_t v, Mat<const T> G) const {
    const Scratch& scratch = pass.scratch;
    const int64_t u = net.below(v);
    const Mat<T> to = scratch.cotangent[u];
    if (G && direct(u)) {
      if (!scratch.begun[u] && net.pulls_through(u) && direct(net.node(u).input[0])) {
        const int64_t b = net.node(u).input[0];
        const Mat<T> product = scratch.begun[b] ? to : scratch.cotangent[b];
        const ApplySlope<T> after{scratch.rows.first[u], product, scratch.cotangent[b], scratch.begun[b]};
        linear_pull<T>(net, v, pass.rows, G, product, false, after);
        scratch.begun[b] = scratch.done[u] = true;
      } else {
        linear_pull<T>(net, v, pass.rows, G, to, scratch.begun[u], Nothing{});
      }
      scratch.begun[u] = true;
    }
    if (!passes(u)) return;
    // Here P is one row for all, or forward would have left what it pulls.
    const int64_t n = rows_of(pass, u);
    Mat<T> side = n == 1 && !scratch.begun[u] ? to : Mat<T>{scratch.bend.at, 0};
    if (v == net.y) {
      copy(side.at, net.at(v).rows, net.width(u));
    } else {
      linear_pull<T>(net, v, 1, scratch.cotangent[v], side, false, Nothing{});
    }
    if (side.at != to.at) {
      put(n, net.whole(u), to, scratch.begun[u], Itself{}, Mat<const T>{side.at, 0});
    }
    scratch.begun[u] = true;
  }

  void rows_light(const Pass& pass, int64_t v, Mat<const T> G) const {
    const Scratch& scratch = pass.scratch;
    const Node& node = net.node(v);
    if (pull_and_scale(pass, v)) return;
    Operands<T> o = scratch.rows.operands(net, v, pass.rows);
    if (G && way(v).trained && wants(node.place[0])) {
      add_parameter(v, [&](T* sums) { node_parameters<T>(o, G, sums); }, scratch);
    }
    for (int64_t nth = 0; nth < node.inputs; ++nth) {
      const int64_t u = node.input[nth];
      const bool by_itself = G && direct(u);
      if (!by_itself && !passes(u)) continue;
      o.rows = rows_of(pass, u);
      if (node.kind == node_columns) start(scratch.cotangent, scratch.begun, u, o.rows);
      node_pull<T>(o, by_itself ? G : Mat<const T>(scratch.cotangent[v]), nth, scratch.cotangent[u], scratch.begun[u]);
      scratch.begun[u] = true;
    }
  }
};

// Adds up the threads' sums in their order and lays them out as the parameters are.
template <class T> struct ProgramReduction {
  const BackwardCall& call;
  const GradientLayout<T>& layout;
  const T* sums;  // thread after thread
  int64_t params, threads;

  void run(const Runtime& runtime) const {
    const int64_t helpers = layout.size < shared_from ? 1 : threads;
    auto work = [&](int64_t t) {
      for (int64_t p = 0; p < params; ++p) {
        if (call.grads[p]) parameter(p, helpers, t);
      }
    };
    on_threads(runtime, helpers, work);
  }

 private:
  // One helper's share of a parameter's rows.
  void parameter(int64_t p, int64_t helpers, int64_t helper) const {
    const typename GradientLayout<T>::Place& place = layout.place[p];
    T* to = static_cast<T*>(call.grads[p]);
    const int64_t n = place.out ? place.out : 1;
    const int64_t end = n * (helper + 1) / helpers;
    for (int64_t i = n * helper / helpers; i < end; ++i) {
      if (place.transposed) {
        for (int64_t j = 0; j < place.in; ++j) {
          to[i * place.in + j] = element(place.at + j * place.ld() + i);
        }
      } else {
        row(to + i * place.in, place.at + i * place.ld(), place.in);
      }
    }
  }
  T element(int64_t at) const {
    T total = sums[at];
    for (int64_t t = 1; t < threads; ++t) total += sums[t * layout.size + at];
    return total;
  }
  void row(T* to, int64_t at, int64_t n) const {
    copy(to, sums + at, n);
    for (int64_t t = 1; t < threads; ++t) {
      const T* more = sums + t * layout.size + at;
      for (int64_t j = 0; j < n; ++j) to[j] += more[j];
    }
  }
};

template <class T>
Status backward(const Plan& plan, const BackwardCall& call, const Runtime& runtime) {
  const Blocks blocks(call.N);
  Errand errand{any_slope_gradient<T>(plan, call), false};
  for (int64_t v = 1; v <= plan.count; ++v) {
    errand.curved |= call.way[v].wanted && plan.flow[v].used && plan.nodes[v - 1].curved;
  }
  const int64_t threads = min_of<int64_t>(max_of(call.threads, 1), blocks.count);
  // The layout itself is in front of the sums that it lays out.
  Bump places;
  GradientLayout<T>(places, plan, call.sizes);
  char* first = static_cast<char*>(runtime.acquire(places.lines() + 64));
  if (!first) return out_of_memory;
  Bump at{first, 0};
  const GradientLayout<T> layout(at, plan, call.sizes);
  const size_t sums_bytes = size_t(layout.size) * size_t(threads) * sizeof(T);
  const auto weights_in = [&](Bump& memory) {
    return ProgramBackwardWeights<T>(plan, call, errand, memory);
  };
  const auto scratch_in = [&](Bump& memory, const Program<T>& net) {
    return ProgramBackwardScratch<T>(memory, net, call, errand, blocks.capacity);
  };
  const Crew<T, decltype(weights_in), decltype(scratch_in)> crew(threads, sums_bytes, weights_in,
                                                                 scratch_in);
  char* memory = static_cast<char*>(runtime.acquire(crew.bytes()));
  if (!memory) {
    runtime.release(first, places.lines() + 64);
    return out_of_memory;
  }
  T* sums = reinterpret_cast<T*>(memory);
  crew.run(runtime, memory,
           [&](int64_t t, const auto& weights, ProgramBackwardScratch<T> scratch) {
             scratch.sums = sums + t * layout.size;
             clear(scratch.sums, layout.size);
             const ProgramBackward<T> pass{weights.net, call, blocks, errand, layout};
             const int64_t end = first_block(blocks, threads, t + 1);
             for (int64_t b = first_block(blocks, threads, t); b < end; ++b) pass.run(scratch, b);
           });
  ProgramReduction<T>{call, layout, sums, plan.params, threads}.run(runtime);
  runtime.release(memory, crew.bytes());
  runtime.release(first, places.lines() + 64);
  return ok;
}

}  // namespace
