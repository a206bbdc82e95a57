// Branch and bound over the switches of a network of ReLUs or LeakyReLUs: is a slope below a margin
// anywhere in a box? monokernel/several_layers.py has the mathematics.
//
// A branch is a polytope in the columns of the box: the box, a half-space for each neuron that was
// switched, and one for each linear function below the slope, for only where that is below the margin
// can the slope be. Ranges of neurons and the least value of the slope are linear programmes over it.
// The simplex method solves them from vertex to vertex, in plain floating point: what is proved rests
// on the multipliers that it ends with, whatever they are, by weak duality and rounded outwards.
//
// Everything is in half-widths of the box, x = c + r ε. Compiled once, without a wider instruction set:
// AVX-512 was no faster in columns as few as these.
#include "c_api.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <new>
#include <utility>
#include <vector>

namespace {

typedef std::vector<double> Numbers;

constexpr double U = 0x1p-53;  // the unit roundoff
constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double tiny = 1e-300;     // where products underflow
constexpr int cuts = 3;             // linear functions below the slope, in each branch
constexpr int points_kept = 8;      // of a run
constexpr double tolerance = 1e-9;  // what the simplex method takes for zero

double size_of(double low, double high) { return std::max(std::fabs(low), std::fabs(high)); }

// ⟨w, ε⟩ + w0 to within e everywhere in the box.
struct Linear {
  Numbers w;
  double w0 = 0, e = 0;
};

// {ε in [-1, 1]^m : ⟨g_r, ε⟩ <= end_r}, and a vertex of it: the constraints it lies on, of which the
// first m are ε_k <= 1, the next m are -ε_k <= 1, and then come the rows.
class Polytope {
 public:
  Numbers x, multiplier;
  std::vector<int> basis;

  explicit Polytope(int columns)
      : x(columns), multiplier(columns), basis(columns), m_(columns), inverse_(columns * columns),
        way_(columns), pivots_(columns), wide_(2 * columns * columns) {}

  int rows() const { return rows_; }

  void load(const Numbers& packed, const std::vector<int>& at) {
    rows_ = 0;
    for (size_t i = 0; i < packed.size(); i += m_ + 1) append(&packed[i]);
    basis = at;
  }
  Numbers packed() const {
    Numbers all;
    for (int r = 0; r < rows_; ++r) {
      for (int k = 0; k < m_; ++k) all.push_back(normals_[k * room_ + r]);
      all.push_back(ends_[r]);
    }
    return all;
  }

  // Keeps f <= end, which the vertex satisfies already or is said to.
  void keep_below(const Linear& f, double end) {
    Numbers row(f.w);
    row.push_back(end - f.w0 + f.e + 4 * U * (std::fabs(end) + std::fabs(f.w0) + f.e));
    append(row.data());
    refresh();
  }
  void drop_last() { --rows_; }

  bool satisfies(const double* point, int from) const {
    for (int r = from; r < rows_; ++r) {
      double at = 0;
      for (int k = 0; k < m_; ++k) at += normals_[k * room_ + r] * point[k];
      if (!(at <= ends_[r])) return false;
    }
    return true;
  }

  double at(const Linear& f) const {
    double value = f.w0;
    for (int k = 0; k < m_; ++k) value += f.w[k] * x[k];
    return value;
  }

  void normal(int constraint, Numbers& w) const {
    w.resize(m_);
    for (int k = 0; k < m_; ++k) w[k] = normal(constraint, k);
  }

  // The vertex of the basis. False where its constraints do not meet in a point.
  bool stand() {
    const int m = m_, wide = 2 * m;
    std::fill(wide_.begin(), wide_.end(), 0.0);
    for (int i = 0; i < m; ++i) {
      for (int k = 0; k < m; ++k) wide_[i * wide + k] = normal(basis[i], k);
      wide_[i * wide + m + i] = 1;
    }
    for (int c = 0; c < m; ++c) {
      int best = c;
      for (int i = c + 1; i < m; ++i) {
        if (std::fabs(wide_[i * wide + c]) > std::fabs(wide_[best * wide + c])) best = i;
      }
      if (!(std::fabs(wide_[best * wide + c]) > 1e-12)) return false;
      if (best != c) {
        std::swap_ranges(&wide_[c * wide], &wide_[c * wide] + wide, &wide_[best * wide]);
      }
      const double by = 1 / wide_[c * wide + c];
      for (int k = 0; k < wide; ++k) wide_[c * wide + k] *= by;
      for (int i = 0; i < m; ++i) {
        const double f = wide_[i * wide + c];
        if (i == c || f == 0) continue;
        for (int k = 0; k < wide; ++k) wide_[i * wide + k] -= f * wide_[c * wide + k];
      }
    }
    for (int k = 0; k < m; ++k) {
      x[k] = 0;
      for (int i = 0; i < m; ++i) {
        inverse_[k * m + i] = wide_[k * wide + m + i];
        x[k] += inverse_[k * m + i] * (basis[i] < 2 * m ? 1.0 : ends_[basis[i] - 2 * m]);
      }
    }
    refresh();
    return true;
  }

  // A lower bound of f. Goes to a vertex where it is least.
  double least(const Linear& f) {
    const int m = m_;
    double steepest = 0;
    for (double w : f.w) steepest = std::max(steepest, std::fabs(w));
    for (int step = 0; step < 40 + 10 * m; ++step) {
      int leaves = -1;
      double worst = -tolerance * steepest;
      for (int i = 0; i < m; ++i) multiplier[i] = 0;
      for (int k = 0; k < m; ++k) {
        for (int i = 0; i < m; ++i) multiplier[i] -= f.w[k] * inverse_[k * m + i];
      }
      for (int i = 0; i < m; ++i) {
        if (multiplier[i] < worst) worst = multiplier[leaves = i];
      }
      if (leaves < 0) break;
      for (int k = 0; k < m; ++k) way_[k] = -inverse_[k * m + leaves];
      const int enters = go();
      if (enters < 0 || !replace(leaves, enters)) break;
    }
    return bound(f);
  }

 private:
  int m_, rows_ = 0, room_ = 0;
  Numbers normals_, ends_, slack_, along_, inverse_, way_, pivots_, wide_;

  double normal(int constraint, int k) const {
    if (constraint < m_) return constraint == k;
    if (constraint < 2 * m_) return -(constraint - m_ == k);
    return normals_[k * room_ + constraint - 2 * m_];
  }
  bool standing_on(int constraint) const {
    return std::find(basis.begin(), basis.end(), constraint) != basis.end();
  }

  void append(const double* row) {
    if (rows_ == room_) {
      const int more = 2 * room_ + 32;
      Numbers wider(m_ * more);
      for (int k = 0; k < m_; ++k)
        std::copy_n(normals_.data() + k * room_, rows_, &wider[k * more]);
      normals_.swap(wider);
      room_ = more;
      ends_.resize(more), slack_.resize(more), along_.resize(more);
    }
    for (int k = 0; k < m_; ++k) normals_[k * room_ + rows_] = row[k];
    ends_[rows_++] = row[m_];
  }

  void refresh() {
    for (int r = 0; r < rows_; ++r) slack_[r] = ends_[r];
    for (int k = 0; k < m_; ++k) {
      const double* g = normals_.data() + k * room_;
      for (int r = 0; r < rows_; ++r) slack_[r] -= g[r] * x[k];
    }
  }

  // Along ``way`` up to the first constraint in it, which is returned.
  int go() {
    const int m = m_;
    double far = infinity, pivot = 0;
    int enters = -1;
    const auto meets = [&](int constraint, double slack, double by) {
      if (!(by > 1e-11)) return;
      const double to = std::max(slack, 0.0) / by;
      if (to > far || (to == far && by <= pivot) || standing_on(constraint)) return;
      far = to, pivot = by, enters = constraint;
    };
    for (int k = 0; k < m; ++k) {
      if (way_[k] > 0) meets(k, 1 - x[k], way_[k]);
      if (way_[k] < 0) meets(m + k, 1 + x[k], -way_[k]);
    }
    std::fill_n(along_.begin(), rows_, 0.0);
    for (int k = 0; k < m; ++k) {
      const double* g = normals_.data() + k * room_;
      for (int r = 0; r < rows_; ++r) along_[r] += g[r] * way_[k];
    }
    for (int r = 0; r < rows_; ++r) meets(2 * m + r, slack_[r], along_[r]);
    if (enters < 0) return enters;
    for (int k = 0; k < m; ++k) x[k] += far * way_[k];
    for (int r = 0; r < rows_; ++r) slack_[r] -= far * along_[r];
    return enters;
  }

  bool replace(int leaves, int enters) {
    const int m = m_;
    for (int i = 0; i < m; ++i) pivots_[i] = 0;
    for (int k = 0; k < m; ++k) {
      const double g = normal(enters, k);
      if (g == 0) continue;
      for (int i = 0; i < m; ++i) pivots_[i] += g * inverse_[k * m + i];
    }
    if (!(std::fabs(pivots_[leaves]) > 1e-13)) return false;
    const double by = 1 / pivots_[leaves];
    for (int k = 0; k < m; ++k) {
      const double own = inverse_[k * m + leaves] * by;
      for (int i = 0; i < m; ++i) inverse_[k * m + i] -= pivots_[i] * own;
      inverse_[k * m + leaves] = own;
    }
    basis[leaves] = enters;
    return true;
  }

  // f >= f + Σ λ_r (⟨g_r, ε⟩ - end_r) for any λ >= 0, and that has its least value in the box where
  // each ε_k is at an end; or without any λ.
  double bound(const Linear& f) const {
    Numbers h(f.w);
    double value = f.w0 - f.e, size = std::fabs(f.w0) + f.e, plain = value;
    for (double w : f.w) size += 2 * std::fabs(w), plain -= std::fabs(w);
    for (int i = 0; i < m_; ++i) {
      if (basis[i] < 2 * m_ || !(multiplier[i] > 0)) continue;
      const int r = basis[i] - 2 * m_;
      value -= multiplier[i] * ends_[r];
      size += multiplier[i] * std::fabs(ends_[r]);
      for (int k = 0; k < m_; ++k) {
        const double g = multiplier[i] * normals_[k * room_ + r];
        h[k] += g;
        size += 2 * std::fabs(g);
      }
    }
    for (double w : h) value -= std::fabs(w);
    value = std::max(value, plain) - 4 * U * (2 * m_ + 16) * size;
    return value > -infinity && value < infinity ? value : -infinity;
  }
};

// What is known where so many switches are decided: of each neuron of all hidden layers its switch (+1
// on, -1 off, 0 open) and the range of a; of the first layer also the vertices where a is least and
// most. ``behind`` are the neurons of later layers that were switched: as ranges narrow, so do their
// half-spaces.
struct Branch {
  std::vector<signed char> decided;
  Numbers low, high, ends;
  std::vector<char> ended;
  Numbers rows;
  std::vector<int> basis, behind;
  int old_rows;
  double known;
};

enum class Verdict { proved, cut, stuck };

class Search {
 public:
  Search(const mk_piecewise& net, const double* row, const double* column, double margin,
         const double* c, const double* r, int64_t m, const int64_t* moving)
      : net_(net), L_(int(net.layers)), m_(int(m)), margin_(margin), moving_(moving, moving + m),
        centre_(c, c + net.d), radius_(r, r + net.d), polytope_(int(m)) {
    for (int l = 0; l < L_; ++l) {
      from_.push_back(total_);
      H_.push_back(int(net.widths[l]));
      total_ += H_[l];
    }
    row_.assign(row, row + H_[L_ - 1]);
    column_.assign(column, column + H_[0]);
    widest_ =
        int(std::max<int64_t>(net.d, *std::max_element(H_.begin(), H_.end())) + 64 + net.folded);
    P_low_.resize(total_), P_high_.resize(total_), a_.resize(total_), score_.resize(total_);
    z_.resize(total_), q_size_.resize(total_), r_.resize(total_), adjoint_.resize(total_);
    first_layer();
    Branch whole;
    whole.decided.assign(total_, 0);
    whole.low.assign(total_, -infinity), whole.high.assign(total_, infinity);
    whole.ends.assign(2 * H_[0] * m_, 0.0), whole.ended.assign(2 * H_[0], 0);
    for (int k = 0; k < m_; ++k) whole.basis.push_back(k);
    whole.old_rows = 0, whole.known = -infinity;
    open_.push_back(std::move(whole));
  }

  // Half of the open branches, those that were left longest.
  Search* split() {
    if (open_.size() < 2) return nullptr;
    Search* other = new (std::nothrow) Search(*this);
    if (!other) return nullptr;
    const auto half = open_.begin() + open_.size() / 2;
    other->open_.erase(other->open_.begin() + (half - open_.begin()), other->open_.end());
    other->stuck_ = infinity;
    open_.erase(open_.begin(), half);
    return other;
  }

  void run(int64_t most, double seconds, double* points, int64_t* tally, double* least) {
    typedef std::chrono::steady_clock Clock;
    const auto begin = Clock::now();
    const auto over = [&] {
      return std::chrono::duration<double>(Clock::now() - begin).count() >= seconds;
    };
    int64_t bounded = 0, proved = 0;
    found_ = 0, points_ = points;
    for (; bounded < most && !open_.empty() && found_ < points_kept && !over(); ++bounded) {
      Branch branch = std::move(open_.back());
      open_.pop_back();
      const Verdict verdict = bound(branch);
      if (verdict == Verdict::proved) ++proved;
      if (verdict == Verdict::stuck) stuck_ = std::min(stuck_, branch.known);
    }
    tally[0] = bounded, tally[1] = proved, tally[2] = int64_t(open_.size()), tally[3] = found_;
    *least = std::min(margin_, stuck_);
    for (const Branch& branch : open_) *least = std::min(*least, branch.known);
  }

 private:
  const mk_piecewise net_;
  int L_, m_, total_ = 0, widest_;
  double margin_, stuck_ = infinity;
  std::vector<int> H_, from_;
  std::vector<int64_t> moving_;
  Numbers row_, column_, centre_, radius_, first_sizes_;
  std::vector<Linear> first_;  // a of the first layer
  std::vector<Branch> open_;
  Polytope polytope_;
  // Of the branch at hand, for every neuron: the range of P, the value a at the vertex, how much
  // deciding it promises; the weights of z and r below the slope, and the size of q's.
  Numbers P_low_, P_high_, a_, score_, z_, q_size_, r_, adjoint_;
  Numbers weights_, next_;
  double* points_ = nullptr;
  int64_t found_ = 0;

  double left(int l) const { return net_.left[l]; }
  double steepest(int l) const { return std::max(1.0, std::fabs(left(l))); }

  void first_layer() {
    const int d = int(net_.d);
    std::vector<char> moves(d, 0);
    for (int64_t k : moving_) moves[k] = 1;
    for (int i = 0; i < H_[0]; ++i) {
      const double* w = net_.W[0] + i * d;
      Linear f;
      f.w0 = net_.b[0][i];
      double size = std::fabs(f.w0), rest = 0;
      for (int k = 0; k < d; ++k) {
        f.w0 += w[k] * centre_[k];
        size += std::fabs(w[k]) * (std::fabs(centre_[k]) + radius_[k]);
        if (!moves[k]) rest += std::fabs(w[k]) * radius_[k];
      }
      for (int64_t k : moving_) f.w.push_back(w[k] * radius_[k]);
      f.e = rest * (1 + 1e-9) + 4 * U * widest_ * size + tiny;
      first_.push_back(std::move(f));
      first_sizes_.push_back(size);
    }
  }

  int layer_of(int neuron) const {
    int l = L_ - 1;
    while (neuron < from_[l]) --l;
    return l;
  }

  // Ends of an open neuron's range, which may be taken as wider: nothing is divided by 0.
  static double low_of(const Branch& at, int j) { return std::min(at.low[j], -tiny); }
  static double high_of(const Branch& at, int j) { return std::max(at.high[j], tiny); }

  // --- linear functions below a value -----------------------------------------------------------

  // Below ⟨h, h_top⟩ + constant, ``weights_`` being h, which is used up; with ``switches`` also
  // ⟨z_, z⟩ of all layers up to top. ``a`` is where the function is to be high. ``size`` is that of
  // what was added so far.
  void below(const Branch& at, int top, double constant, double size, bool switches,
             const double* a, Linear& f) {
    for (int l = top; l >= 0; --l) {
      const double s0 = left(l), rise = 1 - s0;
      for (int i = 0; i < H_[l]; ++i) {
        const int j = from_[l] + i;
        const double low = low_of(at, j), high = high_of(at, j);
        const double h = weights_[i], z = switches ? z_[j] : 0;
        double w, z_slope = 0;
        if (at.decided[j]) {
          w = at.decided[j] > 0 ? h : s0 * h;
          if (switches) r_[j] = 0;
        } else {
          const bool on = a ? a[j] > 0 : high > -low;
          // z >= a / high and z <= 1 - a / low, where they are better than 0 and 1.
          if (z > 0 && on) z_slope = 1 / high * (1 - 8 * U);
          if (z < 0 && !on) z_slope = -1 / low * (1 - 8 * U);
          const double r = rise * h, chord = high / (high - low) * (1 + 8 * U);
          w = s0 * h + r * (r < 0 ? chord : on ? 1.0 : 0.0) + z * z_slope;
          constant += std::min(z, 0.0);
          if (r < 0) constant -= r * chord * low, size += std::fabs(r * chord * low);
          if (switches) r_[j] = r;
        }
        const double made = std::fabs(z) * z_slope + (2 + 2 * std::fabs(s0)) * std::fabs(h);
        size += std::fabs(z) + made * size_of(at.low[j], at.high[j]);
        weights_[i] = w;
      }
      if (l == 0) break;
      const int n = H_[l - 1];
      next_.assign(n, 0.0);
      for (int i = 0; i < H_[l]; ++i) {
        const double w = weights_[i];
        if (w == 0) continue;
        const double* W = net_.W[l] + i * n;
        double sizes = std::fabs(net_.b[l][i]);
        for (int k = 0; k < n; ++k) {
          const int j = from_[l - 1] + k;
          next_[k] += w * W[k];
          sizes += std::fabs(W[k]) * size_of(at.low[j], at.high[j]) * steepest(l - 1);
        }
        constant += w * net_.b[l][i];
        size += std::fabs(w) * sizes;
      }
      weights_.swap(next_);
    }
    f.w.assign(m_, 0.0);
    f.w0 = constant, f.e = 0;
    for (int i = 0; i < H_[0]; ++i) {
      const double w = weights_[i];
      if (w == 0) continue;
      const Linear& own = first_[i];
      for (int k = 0; k < m_; ++k) f.w[k] += w * own.w[k];
      f.w0 += w * own.w0;
      f.e += std::fabs(w) * own.e;
      size += std::fabs(w) * first_sizes_[i];
    }
    f.e = f.e * (1 + 1e-9) + 4 * U * widest_ * (L_ + 2) * size + tiny;
  }

  // Below sign·a of a neuron.
  void below_neuron(const Branch& at, int neuron, double sign, Linear& f) {
    const int l = layer_of(neuron), i = neuron - from_[l];
    if (l == 0) {
      f = first_[i];
      for (double& w : f.w) w *= sign;
      f.w0 *= sign;
      return;
    }
    const double* W = net_.W[l] + i * H_[l - 1];
    weights_.resize(H_[l - 1]);
    for (int k = 0; k < H_[l - 1]; ++k) weights_[k] = sign * W[k];
    below(at, l - 1, sign * net_.b[l][i], std::fabs(net_.b[l][i]), false, nullptr, f);
  }

  // Ranges of P by intervals.
  void ranges_of_P(const Branch& at) {
    for (int i = 0; i < H_[L_ - 1]; ++i) {
      const double off = 16 * U * net_.folded * std::fabs(row_[i]);
      P_low_[from_[L_ - 1] + i] = row_[i] - off, P_high_[from_[L_ - 1] + i] = row_[i] + off;
    }
    for (int l = L_ - 1; l > 0; --l) {
      const int n = H_[l - 1];
      const double gamma = (H_[l] + 8 + double(net_.folded)) * U * 1.01, s0 = left(l);
      double *low = &P_low_[from_[l - 1]], *high = &P_high_[from_[l - 1]];
      std::fill_n(low, n, 0.0), std::fill_n(high, n, 0.0);  // centre and radius, first
      for (int i = 0; i < H_[l]; ++i) {
        const int j = from_[l] + i;
        const double least = at.decided[j] > 0 ? 1 : at.decided[j] < 0 ? s0 : std::min(s0, 1.0);
        const double most = at.decided[j] > 0 ? 1 : at.decided[j] < 0 ? s0 : std::max(s0, 1.0);
        const auto ends = std::minmax(
            {P_low_[j] * least, P_low_[j] * most, P_high_[j] * least, P_high_[j] * most});
        const double p = 0.5 * ends.first + 0.5 * ends.second;
        const double r = (0.5 * ends.second - 0.5 * ends.first) * (1 + 16 * U) +
                         2 * gamma * (std::fabs(ends.first) + std::fabs(ends.second));
        if (p == 0 && r == 0) continue;
        const double* W = net_.W[l] + i * n;
        for (int k = 0; k < n; ++k) low[k] += p * W[k], high[k] += r * std::fabs(W[k]);
      }
      for (int k = 0; k < n; ++k) {
        const double c = low[k], r = high[k] * (1 + 4 * gamma) + 2 * U * std::fabs(c);
        low[k] = c - r, high[k] = c + r;
      }
    }
  }

  // Below the slope, and high where a are the values; fills the scores.
  void below_slope(const Branch& at, const Numbers& a, Linear& f) {
    adjoints(at, a);
    double constant = 0, size = 0;
    Numbers w(column_), P;
    for (int l = 0; l < L_; ++l) {
      const double s0 = left(l), rise = 1 - s0;
      P.assign(H_[l], 0.0);
      for (int i = 0; i < H_[l]; ++i) {
        const int j = from_[l] + i;
        const double low = P_low_[j], high = P_high_[j];
        double q = 0;
        z_[j] = q_size_[j] = 0;
        P[i] = at.decided[j] > 0 ? w[i] : s0 * w[i];
        if (!at.decided[j]) {
          q = rise * w[i];
          const double near = q >= 0 ? low : high, far = q >= 0 ? high : low;
          if (l == L_ - 1) {  // P is a constant, but for how it was folded
            z_[j] = q * (0.5 * near + 0.5 * far);
          } else {
            // q >= near z and q >= P - far (1 - z): which of them is closer there, both of them
            // with z as the lines have it.
            const double z = a[j] > 0 ? std::min(1.0, a[j] / high_of(at, j))
                                      : std::max(0.0, 1 - a[j] / low_of(at, j));
            if (q * near * z >= q * (adjoint_[j] - far * (1 - z))) {
              z_[j] = q * near;
            } else {
              z_[j] = q * far, constant -= q * far, P[i] += q;
            }
            q_size_[j] = std::fabs(q) * (high - low);
          }
        }
        if (l == L_ - 1) constant -= (std::fabs(q) + std::fabs(P[i])) * (high - low);
        size += 2 * (std::fabs(q) + std::fabs(P[i]) + std::fabs(w[i])) * size_of(low, high);
      }
      if (l == L_ - 1) break;
      Numbers next(H_[l + 1]);
      for (int i = 0; i < H_[l + 1]; ++i) {
        const double* W = net_.W[l + 1] + i * H_[l];
        double sizes = 0;
        for (int k = 0; k < H_[l]; ++k) next[i] += P[k] * W[k], sizes += std::fabs(P[k] * W[k]);
        const int j = from_[l + 1] + i;
        size += sizes * steepest(l + 1) * size_of(P_low_[j], P_high_[j]);
      }
      w.swap(next);
    }
    for (int i = 0; i < H_[L_ - 1]; ++i) constant += P[i] * row_[i];
    weights_.assign(H_[L_ - 1], 0.0);
    below(at, L_ - 1, constant, size, true, a.data(), f);
    for (int j = 0; j < total_; ++j) score_[j] = at.decided[j] ? -1 : missed(at, j, a[j]);
  }

  // By how much the lines of a neuron miss its z, q and r at a.
  double missed(const Branch& at, int j, double a) const {
    const double low = low_of(at, j), high = high_of(at, j), z = z_[j], r = r_[j];
    a = std::min(std::max(a, low), high);
    const double over = a > 0 ? 1 - a / high : 0, under = a > 0 ? 0 : 1 - a / low;
    const double chord = high * (a - low) / (high - low) - std::max(a, 0.0);
    return std::fabs(z) * (z > 0 ? over : under) + q_size_[j] * std::max(over, under) +
           std::max(-r, 0.0) * chord + tolerance * (std::fabs(z) + std::fabs(r)) + tiny;
  }

  // --- points -----------------------------------------------------------------------------------

  // All a at the vertex.
  void values() {
    for (int i = 0; i < H_[0]; ++i) a_[i] = polytope_.at(first_[i]);
    for (int l = 1; l < L_; ++l) {
      const double* before = &a_[from_[l - 1]];
      for (int i = 0; i < H_[l]; ++i) {
        const double* W = net_.W[l] + i * H_[l - 1];
        double a = net_.b[l][i];
        for (int k = 0; k < H_[l - 1]; ++k)
          a += W[k] * before[k] * (before[k] > 0 ? 1 : left(l - 1));
        a_[from_[l] + i] = a;
      }
    }
  }

  // P of all neurons where a are the values, with the switches that are decided.
  void adjoints(const Branch& at, const Numbers& a) {
    std::copy(row_.begin(), row_.end(), &adjoint_[from_[L_ - 1]]);
    for (int l = L_ - 1; l > 0; --l) {
      double* P = &adjoint_[from_[l - 1]];
      std::fill_n(P, H_[l - 1], 0.0);
      for (int i = 0; i < H_[l]; ++i) {
        const int j = from_[l] + i;
        const bool on = at.decided[j] ? at.decided[j] > 0 : a[j] > 0;
        const double p = adjoint_[j] * (on ? 1 : left(l));
        if (p == 0) continue;
        const double* W = net_.W[l] + i * H_[l - 1];
        for (int k = 0; k < H_[l - 1]; ++k) P[k] += p * W[k];
      }
    }
  }

  // A point inside of the polytope: between the vertices that are farthest from each constraint.
  void report() {
    Numbers middle(m_, 0.0);
    Linear f;
    const int constraints = 2 * m_ + polytope_.rows();
    for (int i = 0; i < constraints; ++i) {
      polytope_.normal(i, f.w);
      polytope_.least(f);
      for (int k = 0; k < m_; ++k) middle[k] += polytope_.x[k] / constraints;
    }
    double* x = points_ + found_++ * net_.d;
    std::copy(centre_.begin(), centre_.end(), x);
    for (int k = 0; k < m_; ++k) x[moving_[k]] += radius_[moving_[k]] * middle[k];
  }

  // --- branches ---------------------------------------------------------------------------------

  static void decide(Branch& at, int j) {
    // One that may be 0 and nothing above is off: so PyTorch has it.
    if (at.high[j] <= 0) at.decided[j] = -1;
    if (at.low[j] > 0) at.decided[j] = 1;
  }

  // Ranges of the neurons that are open, and what they decide. False where nothing is left.
  bool narrow(Branch& at) {
    Linear f;
    for (int j = 0; j < total_; ++j) {
      const bool first = j < H_[0];
      for (int side = 0; side < 2; ++side) {
        // A size is needed of every neuron, if only once.
        if (at.decided[j] && (side ? at.high[j] < infinity : at.low[j] > -infinity)) continue;
        double* end = first ? at.ends.data() + (2 * j + side) * m_ : nullptr;
        if (first && at.ended[2 * j + side] && polytope_.satisfies(end, at.old_rows)) continue;
        below_neuron(at, j, side ? -1 : 1, f);
        const double bound = polytope_.least(f);
        if (side)
          at.high[j] = std::min(at.high[j], -bound);
        else
          at.low[j] = std::max(at.low[j], bound);
        if (first)
          std::copy(polytope_.x.begin(), polytope_.x.end(), end), at.ended[2 * j + side] = 1;
        decide(at, j);
      }
      if (at.low[j] > at.high[j]) return false;
    }
    return true;
  }

  // The half-spaces of neurons behind the first layer, closer now: all of them, or where the vertex is
  // outside. False where nothing is left.
  bool tighten(const Branch& at, bool all) {
    Linear f;
    for (int j : at.behind) {
      below_neuron(at, j, -at.decided[j], f);
      if (!all && polytope_.at(f) <= tolerance) continue;
      if (polytope_.least(f) > 0) return false;
      polytope_.keep_below(f, std::max(0.0, polytope_.at(f)));
    }
    return true;
  }

  Verdict bound(Branch& at) {
    polytope_.load(at.rows, at.basis);
    at.rows.clear();
    if (!polytope_.stand()) return Verdict::stuck;
    const int rows = polytope_.rows();
    if (!narrow(at)) return Verdict::proved;
    ranges_of_P(at);
    const bool all = std::find(at.decided.begin(), at.decided.end(), 0) == at.decided.end();
    Linear f;
    for (int round = 0; round < (all ? 1 : cuts); ++round) {
      values();
      below_slope(at, a_, f);
      const double low = polytope_.least(f);
      at.known = std::max(at.known, std::min(low, margin_));
      if (low >= margin_) return Verdict::proved;
      if (low == -infinity) return Verdict::stuck;  // numbers that are none, or overflow
      if (!all) polytope_.keep_below(f, std::max(margin_, polytope_.at(f)));
      if (!tighten(at, all)) return Verdict::proved;
    }
    if (all) {
      report();
      return Verdict::stuck;
    }
    values();
    return cut(at, rows);
  }

  // Both branches of the neuron that promises most.
  Verdict cut(const Branch& at, int old_rows) {
    const int j = int(std::max_element(score_.begin(), score_.end()) - score_.begin());
    const std::vector<int> basis = polytope_.basis;
    Linear f;
    const int here = a_[j] > 0 ? 1 : -1;  // the branch of the vertex comes next
    for (int way : {-here, here}) {
      polytope_.basis = basis;
      if (!polytope_.stand()) return Verdict::stuck;
      below_neuron(at, j, -way, f);
      if (polytope_.least(f) > 0) continue;
      Branch next = at;
      next.decided[j] = static_cast<signed char>(way);
      if (way > 0)
        next.low[j] = std::max(next.low[j], 0.0);
      else
        next.high[j] = std::min(next.high[j], 0.0);
      if (j >= H_[0]) next.behind.push_back(j);
      polytope_.keep_below(f, std::max(0.0, polytope_.at(f)));
      next.rows = polytope_.packed();
      polytope_.drop_last();
      next.basis = polytope_.basis;
      next.old_rows = old_rows;
      open_.push_back(std::move(next));
    }
    return Verdict::cut;
  }
};

}  // namespace

#define MK_EXPORT extern "C" __attribute__((visibility("default")))

MK_EXPORT void* mk_search_new(const mk_piecewise* net, const double* row, const double* column,
                              double margin, const double* centre, const double* radius, int64_t m,
                              const int64_t* moving) {
  try {
    return new Search(*net, row, column, margin, centre, radius, m, moving);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

MK_EXPORT void* mk_search_split(void* search) {
  try {
    return static_cast<Search*>(search)->split();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

MK_EXPORT int mk_search_run(void* search, int64_t most, double seconds, double* points,
                            int64_t* tally, double* least) {
  try {
    static_cast<Search*>(search)->run(most, seconds, points, tally, least);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

MK_EXPORT void mk_search_drop(void* search) { delete static_cast<Search*>(search); }
