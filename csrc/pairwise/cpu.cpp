#include <algorithm>
#include <cmath>

#include "common/chunk.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/vector_loop.h"
#include "pairwise/host.h"

namespace kdfast {
namespace pairwise {
namespace {

// Pairs are processed in square blocks that fit into the L1 cache. Their number, and with it the order of every
// sum, depends on the batch alone.
constexpr int64_t kBlock = 32;

int64_t blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

// kBlock rows by some columns of a matrix, as A: in place, or copied with zeros where the matrix or its last vector
// ends.
template <class A>
struct Panel {
  const A* data;
  int64_t stride;
};

constexpr int64_t kCopied = 256, kInPlace = 1024;  // columns of a panel

template <class A>
bool in_place(const Matrix& m, int64_t rows, int64_t begin) {
  return m.dtype == kDtype<A> && m.col_stride == 1 && begin + kBlock <= rows;
}

// Columns [col, col + n); n <= kCopied unless they are in place. Copies fill whole multiples of `unit` columns.
template <class A>
Panel<A> panel(const Matrix& m, int64_t rows, int64_t begin, int64_t col, int64_t n, int64_t unit, A* buffer) {
  const int64_t offset = begin * m.row_stride + col * m.col_stride;
  if (in_place<A>(m, rows, begin) && n % unit == 0) return {static_cast<const A*>(m.data) + offset, m.row_stride};
  const int64_t filled = (n + unit - 1) / unit * unit;
  dispatch_float(m.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(m.data) + offset;
    for (int64_t r = 0; r < kBlock; ++r) {
      A* to = buffer + r * kCopied;
      const int64_t there = begin + r < rows ? n : 0;
      if (there) widen(from + r * m.row_stride, m.col_stride, n, to);
      std::fill(to + there, to + filled, A(0));
    }
  });
  return {buffer, kCopied};
}

// ---- squared distances

// block[i][j] += sum over n columns of (x[i] - y[j])^2.
template <class A>
KD_NOT_INLINED void add_squares(Panel<A> x, Panel<A> y, int64_t n, A* block) {
  for (int64_t i = 0; i < kBlock; i += kTileRows) {
    for (int64_t j = 0; j < kBlock; j += kTileRows) {
      const A *own[kTileRows], *other[kTileRows];
      for (int64_t a = 0; a < kTileRows; ++a) {
        own[a] = x.data + (i + a) * x.stride;
        other[a] = y.data + (j + a) * y.stride;
      }
      A sums[kTileRows][kTileRows];
      tile_sums(own, other, n, [](auto sum, auto p, auto q) KD_INLINED { return sum + (p - q) * (p - q); }, sums);
      for (int64_t a = 0; a < kTileRows; ++a) {
        for (int64_t b = 0; b < kTileRows; ++b) block[(i + a) * kBlock + j + b] += sums[a][b];
      }
    }
  }
}

// f(i0, j0, block) for all blocks of squared distances between n rows of x and m of y, or, without y, for those of x
// with itself on and above the diagonal.
template <class A, class F>
void for_squared_distances(const Matrix& x, int64_t n, const Matrix* y, int64_t m, int64_t dim, const F& f) {
  const int64_t down = blocks_of(n), across = blocks_of(m);
  const Matrix& other = y ? *y : x;
  for_each(down * across, 1, [&](int64_t task) {
    const int64_t i0 = task / across * kBlock, j0 = task % across * kBlock;
    if (!y && j0 < i0) return;
    alignas(64) A own_buffer[kBlock * kCopied], other_buffer[kBlock * kCopied], block[kBlock * kBlock] = {};
    const bool direct = in_place<A>(x, n, i0) && in_place<A>(other, m, j0);
    for (int64_t col = 0, width; col < dim; col += width) {
      width = std::min(direct ? kInPlace : kCopied, dim - col);
      if (width > kLanesOf<A>) width = width / kLanesOf<A> * kLanesOf<A>;  // the rest is a panel of its own
      const Panel<A> a = panel(x, n, i0, col, width, kLanesOf<A>, own_buffer);
      const Panel<A> b = panel(other, m, j0, col, width, kLanesOf<A>, other_buffer);
      add_squares(a, b, width, block);
    }
    f(i0, j0, block);
  });
}

template <class A>
void write_distances(const Matrix& x, int64_t n, const Matrix* y, int64_t m, int64_t dim, bool squared, A* out) {
  for_squared_distances<A>(x, n, y, m, dim, [&](int64_t i0, int64_t j0, const A* block) {
    for (int64_t i = i0; i < std::min(i0 + kBlock, n); ++i) {
      for (int64_t j = j0; j < std::min(j0 + kBlock, m); ++j) {
        const A p = block[(i - i0) * kBlock + j - j0];
        out[i * m + j] = squared ? p : std::sqrt(p);
        if (!y) out[j * m + i] = out[i * m + j];
      }
    }
  });
}

// ---- weighted differences
constexpr int64_t kVectors = kRegisters / 8;  // registers of columns whose sums are in registers

// out[i] += sum over n rows j of weights[i][j] (x[i] - y[j]), for kBlock rows i and `width` columns.
template <class A>
void add_differences(const A* weights, int64_t row_stride, int64_t col_stride, int64_t rows, Panel<A> x, Panel<A> y,
                     int64_t n, int64_t width, A* out) {
  constexpr int64_t kWidth = kRegisterOf<A>;
  for (int64_t c = 0; c < width; c += kVectors * kWidth) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      Register<A> own[kTileRows][kVectors], sum[kTileRows][kVectors];
      const A* w[kTileRows];
      for (int64_t a = 0; a < kTileRows; ++a) {
        w[a] = weights + std::min(i + a, rows - 1) * row_stride;
        for (int64_t v = 0; v < kVectors; ++v) {
          own[a][v] = load_register(x.data + (i + a) * x.stride + c + v * kWidth);
          sum[a][v] = load_register(out + (i + a) * kCopied + c + v * kWidth);
        }
      }
      for (int64_t j = 0; j < n; ++j) {
        Register<A> weight[kTileRows];
        for (int64_t a = 0; a < kTileRows; ++a) weight[a] = fill_register(w[a][j * col_stride]);
        for (int64_t v = 0; v < kVectors; ++v) {
          const Register<A> other = load_register(y.data + j * y.stride + c + v * kWidth);
          for (int64_t a = 0; a < kTileRows; ++a) sum[a][v] += weight[a] * (own[a][v] - other);
        }
      }
      for (int64_t a = 0; a < kTileRows; ++a) {
        for (int64_t v = 0; v < kVectors; ++v) {
          store_register<A>(out + (i + a) * kCopied + c + v * kWidth, sum[a][v]);
        }
      }
    }
  }
}

template <class A>
void write_weighted_differences(const Tensor& weights, const Matrix& x, const Matrix& y, int64_t dim, A factor,
                                const Matrix& out) {
  const int64_t n = weights.size(0), m = weights.size(1), rows = weights.stride(0), cols = weights.stride(1);
  const A* w = static_cast<const A*>(weights.data_ptr());
  const int64_t pieces = (dim + kCopied - 1) / kCopied;
  for_each(blocks_of(n) * pieces, 1, [&](int64_t task) {
    alignas(64) A own_buffer[kBlock * kCopied], other_buffer[kBlock * kCopied], sum[kBlock * kCopied] = {};
    const int64_t i0 = task / pieces * kBlock, col = task % pieces * kCopied, width = std::min(kCopied, dim - col);
    const int64_t height = std::min(kBlock, n - i0), unit = kVectors * kRegisterOf<A>;
    const Panel<A> own = panel(x, n, i0, col, width, unit, own_buffer);
    for (int64_t j0 = 0; j0 < m; j0 += kBlock) {
      const Panel<A> other = panel(y, m, j0, col, width, unit, other_buffer);
      add_differences(w + i0 * rows + j0 * cols, rows, cols, height, own, other, std::min(kBlock, m - j0), width, sum);
    }
    for (int64_t r = 0; r < height; ++r) {
      A* row = sum + r * kCopied;
      for (int64_t c = 0; c < width; ++c) row[c] *= factor;
      write(out, i0 + r, col, width, row);
    }
  });
}

// ---- rkd: the squared distances of one network, rows padded to whole blocks

template <class A>
struct Pairs {
  int64_t rows, stride;
  A *hi, *lo, *inverse;  // [rows, stride]; lo and inverse only for angles, lo only of a float32
};

// `Wide` is what p is summed in.
template <class A, class Wide>
void fill_pairs(const Matrix& x, int64_t dim, const Pairs<A>& p) {
  for_squared_distances<Wide>(x, p.rows, nullptr, p.rows, dim, [&](int64_t i0, int64_t j0, const Wide* block) {
    const auto put = [&](int64_t i, int64_t j, Wide value) {  // beyond the last row: zeros, that is no pair
      if (i >= p.rows) return;
      const int64_t at = i * p.stride + j;
      p.hi[at] = static_cast<A>(value);
      if (p.lo) p.lo[at] = static_cast<A>(value - p.hi[at]);
      if (p.inverse) p.inverse[at] = value > 0 ? static_cast<A>(1 / std::sqrt(value)) : A(0);
    };
    for (int64_t i = i0; i < i0 + kBlock; ++i) {
      for (int64_t j = j0; j < j0 + kBlock; ++j) {
        const Wide value = i < p.rows && j < p.rows ? block[(i - i0) * kBlock + j - j0] : Wide(0);
        put(i, j, value);
        if (j0 > i0) put(j, i, value);
      }
    }
  });
}

// ---- rkd: distances

// Of n squared distances in a row: sum of D.
template <class A>
A distance_sum(const A* p, int64_t n) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED { return floored_distance(p[i]); });
}

template <class A>
struct DistanceSums {
  A loss, slope_dot;  // sum of h, and of h' D^s
};

template <class A>
DistanceSums<A> distance_sums(const A* p_s, const A* p_t, int64_t n, A inverse_mu, A ratio) {
  const auto sums = sum_elements<2, A>(n, [&](int64_t i) KD_INLINED {
    const A d_s = floored_distance(p_s[i]), x = distance_gap(d_s, floored_distance(p_t[i]), inverse_mu, ratio);
    const A u = huber_slope(x, A(1));
    return Terms<A>{huber(x, u, A(0.5)), u * d_s};
  });
  return {sums.a, sums.b};
}

// grad += (scale h' - shift) / D^s, the distance term's dL/dp; 0 where D is the floor.
template <class A>
void add_distance_grad(const A* p_s, const A* p_t, int64_t n, A inverse_mu, A ratio, A scale, A shift, A* grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A d_s = floored_distance(p_s[i]), x = distance_gap(d_s, floored_distance(p_t[i]), inverse_mu, ratio);
    grad[i] += p_s[i] > A(kSmallest) ? (scale * huber_slope(x, A(1)) - shift) / d_s : A(0);
  }
}

constexpr int64_t kPairGrain = 16384;  // pairs that are worth a thread: fewer take less time than to wake one

// The sum of f(row), each over the columns after it, in the order of the rows.
template <class F>
double sum_above_diagonal(int64_t rows, const F& f) {
  std::vector<double> of_row(rows);
  for_each(rows, std::max<int64_t>(1, kPairGrain / rows), [&](int64_t i) { of_row[i] = f(i); });
  double sum = 0;
  for (double x : of_row) sum += x;
  return sum;
}

// The distance term's loss, and the sums over all pairs that its gradient needs.
template <class A>
struct DistanceTerm {
  A inverse_mu = 0, ratio = 0, scale = 0, shift = 0;  // mu: the student's

  // mean_ij h(x_ij) with the mean over rows^2; mu over the pairs. Sums run over the upper triangle.
  double forward(const Pairs<A>& s, const Pairs<A>& t, double weight) {
    const double rows = s.rows, pairs = rows * (rows - 1) / 2;
    const auto sum = [&](const Pairs<A>& p) {
      return sum_above_diagonal(p.rows,
                                [&](int64_t i) { return distance_sum(p.hi + i * p.stride + i + 1, p.rows - i - 1); });
    };
    const double mu_s = sum(s) / pairs, mu_t = sum(t) / pairs;
    inverse_mu = static_cast<A>(1 / mu_s);
    ratio = static_cast<A>(mu_s / mu_t);
    std::vector<double> dots(s.rows);
    const double loss = sum_above_diagonal(s.rows, [&](int64_t i) {
      const int64_t at = i * s.stride + i + 1;
      const DistanceSums<A> sums = distance_sums(s.hi + at, t.hi + at, s.rows - i - 1, inverse_mu, ratio);
      dots[i] = sums.slope_dot;
      return sums.loss;
    });
    double dot = 0;
    for (double x : dots) dot += x;
    const double each = weight * 2 / (rows * rows);
    scale = static_cast<A>(each / mu_s);
    shift = static_cast<A>(each * dot / (pairs * mu_s * mu_s));
    return each * loss;
  }
};

// ---- rkd: angles
template <class A>
KD_HD Squared<Register<A>> load_squared(const Pairs<A>& p, int64_t at) {
  if constexpr (sizeof(A) == 8) return {load_register(p.hi + at), Register<A>{}};
  return {load_register(p.hi + at), load_register(p.lo + at)};
}

template <class A>
KD_HD Squared<Register<A>> all_squared(const Pairs<A>& p, int64_t at) {
  if constexpr (sizeof(A) == 8) return {fill_register(p.hi[at]), Register<A>{}};
  return {fill_register(p.hi[at]), fill_register(p.lo[at])};
}

// The rows of the next vertices are far apart in memory, so the hardware prefetcher does not find them.
constexpr int64_t kPrefetchDistance = 4;  // vertices

template <class A>
KD_HD void prefetch(const A* m, int64_t at) {
  for (int64_t i = 0; m && i < kBlock; i += kLanesOf<A>) __builtin_prefetch(m + at + i);
}

// All triangles ijk with j in block j0 and k in block k0, k > j, with the angle at every vertex i. -> their sum of h.
// Gradients dL/dp: `grad_jk` [rows, rows] is overwritten with the sum over i for the side jk opposite the vertex;
// `grad_ij` [rows, stride] accumulates those of the sides ij and ik: no other call may touch its columns j0.. and k0..
// meanwhile.
template <class A, bool kGradient, bool kDiagonal>
double angle_block(const Pairs<A>& s, const Pairs<A>& t, int64_t j0, int64_t k0, A* grad_ij, A* grad_jk) {
  constexpr int64_t kWidth = kRegisterOf<A>, kWide = kBlock / kWidth;
  using V = Register<A>;
  const V one = fill_register(A(1)), half = fill_register(A(0.5));
  const int64_t height = std::min(kBlock, s.rows - j0), width = std::min(kBlock, s.rows - k0);
  alignas(64) A block_grad_jk[kBlock * kBlock] = {}, after[kBlock * kBlock];
  if (kDiagonal) {
    for (int64_t at = 0; at < kBlock * kBlock; ++at) after[at] = at % kBlock > at / kBlock;
  }
  const A* const prefetched[] = {s.hi, s.lo, s.inverse, t.hi, t.lo, t.inverse, grad_ij};
  double loss = 0;
  for (int64_t i = 0; i < s.rows; ++i) {
    Squared<V> ik_s[kWide], ik_t[kWide];
    V d_s[kWide], d_t[kWide], slopes_ik[kWide] = {}, cos_slopes_ik[kWide] = {};
    Lanes<A> sum = {};
    for (const A* m : prefetched) {
      prefetch(m, (i + kPrefetchDistance) * s.stride + j0);
      prefetch(m, (i + kPrefetchDistance) * s.stride + k0);
    }
    for (int64_t w = 0; w < kWide; ++w) {
      const int64_t at = i * s.stride + k0 + w * kWidth;
      ik_s[w] = load_squared(s, at);
      ik_t[w] = load_squared(t, at);
      d_s[w] = load_register(s.inverse + at);
      d_t[w] = load_register(t.inverse + at);
    }
    for (int64_t j = 0; j < height; ++j) {
      const int64_t ij = i * s.stride + j0 + j;
      const Squared<V> ij_s = all_squared(s, ij), ij_t = all_squared(t, ij);
      const V half_s = fill_register(A(0.5) * s.inverse[ij]), half_t = fill_register(A(0.5) * t.inverse[ij]);
      Lanes<A> slope_ij = {}, cos_slope_ij = {};
#pragma GCC unroll 8
      for (int64_t w = 0; w < kWide; ++w) {
        const int64_t jk = (j0 + j) * s.stride + k0 + w * kWidth;
        const V product_s = half_s * d_s[w], product_t = half_t * d_t[w];
        const V cos_s = cosine(ij_s, ik_s[w], load_squared(s, jk), product_s, one);
        const V cos_t = cosine(ij_t, ik_t[w], load_squared(t, jk), product_t, one);
        const V x = cos_s - cos_t;
        V u = huber_slope(x, one);
        const int64_t at = j * kBlock + w * kWidth;
        if (kDiagonal) u *= load_register(after + at);
        sum.part[w % kParts] += huber(x, u, half);
        if (!kGradient) continue;
        const V slope = u * product_s, cos_slope = u * cos_s;
        store_register<A>(block_grad_jk + at, load_register(block_grad_jk + at) - slope);
        slopes_ik[w] += slope;
        cos_slopes_ik[w] += cos_slope;
        slope_ij.part[w % kParts] += slope;
        cos_slope_ij.part[w % kParts] += cos_slope;
      }
      const A half_ij = A(0.5) * s.inverse[ij];
      if (kGradient) grad_ij[ij] += lane_sum<A>(slope_ij - cos_slope_ij * all(half_ij * half_ij * A(2)));
    }
    for (int64_t w = 0; kGradient && w < kWide; ++w) {
      A* at = grad_ij + i * s.stride + k0 + w * kWidth;
      store_register<A>(at, load_register(at) + (slopes_ik[w] - cos_slopes_ik[w] * (d_s[w] * d_s[w] * half)));
    }
    loss += lane_sum<A>(sum);
  }
  for (int64_t j = 0; kGradient && j < height; ++j) {
    const int64_t first = kDiagonal ? j + 1 : 0, at = (j0 + j) * s.rows + k0;
    for (int64_t k = first; k < width; ++k) grad_jk[at + k] = block_grad_jk[j * kBlock + k];
  }
  return loss;
}

// f(j, k) for all pairs of blocks j <= k, in parallel. A round-robin schedule whose first round is the diagonal: in
// each round no block appears twice. So f accumulates into a block's columns in one order, whatever the number of
// threads.
template <class F>
void for_block_pairs(int64_t blocks, const F& f) {
  for_each(blocks, 1, [&](int64_t j) { f(j, j); });
  const int64_t players = blocks + blocks % 2;  // one of them may be a dummy, the last one
  for (int64_t round = 0; round < players - 1; ++round) {
    for_each(players / 2, 1, [&](int64_t m) {
      const int64_t a = (round + m) % (players - 1);
      const int64_t b = m == 0 ? players - 1 : (round - m + players - 1) % (players - 1);
      if (std::max(a, b) < blocks) f(std::min(a, b), std::max(a, b));
    });
  }
}

// What j = k adds to the sum over j < k, which counts half of all: cos_ijj is 1, or 0 where rows i and j are equal.
// Where only one network tells them apart, that is h(1) / 2 for i and again for j.
template <class A>
double degenerate_loss(const Pairs<A>& s, const Pairs<A>& t) {
  return sum_above_diagonal(s.rows, [&](int64_t i) {
    int64_t differ = 0;
    for (int64_t at = i * s.stride + i + 1; at < i * s.stride + s.rows; ++at) {
      differ += (s.inverse[at] == 0) != (t.inverse[at] == 0);
    }
    return 0.5 * static_cast<double>(differ);
  });
}

// -> the sum of h over vertices i and j < k, with half of j = k.
template <class A>
double angle_loss(const Pairs<A>& s, const Pairs<A>& t, A* grad_ij, A* grad_jk) {
  const int64_t blocks = blocks_of(s.rows);
  std::vector<double> sums(blocks * blocks);
  for_block_pairs(blocks, [&](int64_t j, int64_t k) {
    const int64_t j0 = j * kBlock, k0 = k * kBlock;
    const auto block = grad_ij ? (j == k ? angle_block<A, true, true> : angle_block<A, true, false>)
                               : (j == k ? angle_block<A, false, true> : angle_block<A, false, false>);
    sums[j * blocks + k] = block(s, t, j0, k0, grad_ij, grad_jk);
  });
  double loss = 0;
  for (double x : sums) loss += x;
  return loss + degenerate_loss(s, t);
}

// ---- rkd: the gradient dL/dp [rows, rows] of both terms; on entry its upper triangle is the `grad_jk` of the angles
template <class A>
void finish_grad(const Pairs<A>& s, const Pairs<A>& t, const DistanceTerm<A>* distance, const A* grad_ij, A scale,
                 A* grad) {
  const int64_t rows = s.rows, blocks = blocks_of(rows);
  for_each(blocks * blocks, 1, [&](int64_t task) {
    const int64_t j0 = task / blocks * kBlock, k0 = task % blocks * kBlock;
    if (k0 < j0) return;
    for (int64_t j = j0; j < std::min(j0 + kBlock, rows); ++j) {
      const int64_t begin = std::max(k0, j + 1), end = std::min(k0 + kBlock, rows);
      alignas(64) A share[kBlock] = {};
      for (int64_t k = begin; grad_ij && k < end; ++k) {
        share[k - begin] = scale * (grad[j * rows + k] + grad_ij[j * s.stride + k] + grad_ij[k * s.stride + j]);
      }
      if (distance && begin < end) {
        const int64_t at = j * s.stride + begin;
        add_distance_grad(s.hi + at, t.hi + at, end - begin, distance->inverse_mu, distance->ratio, distance->scale,
                          distance->shift, share);
      }
      for (int64_t k = begin; k < end; ++k) grad[j * rows + k] = grad[k * rows + j] = share[k - begin];
      if (j0 == k0) grad[j * rows + j] = 0;
    }
  });
}

template <class A>
std::vector<Tensor> scratch(const Tensor& like, int64_t matrices, int64_t rows, int64_t stride) {
  std::vector<Tensor> result;
  for (int64_t i = 0; i < matrices; ++i) result.push_back(empty(like, kDtype<A>, {rows, stride}));
  return result;
}

template <class A>
void rkd_rows(const Tensor& student, const Tensor& teacher, double distance_weight, double angle_weight, A* grad,
              A* loss) {
  const int64_t rows = student.size(0), stride = blocks_of(rows) * kBlock;
  const bool angles = angle_weight != 0, single = sizeof(A) == 4;
  const int64_t each = !angles ? 1 : single ? 3 : 2;
  const std::vector<Tensor> m = scratch<A>(student, 2 * each + (angles && grad), rows, stride);
  const auto data = [&](int64_t i) { return static_cast<A*>(m[i].data_ptr()); };
  const auto pairs = [&](int64_t i) {
    return Pairs<A>{rows, stride, data(i), angles && single ? data(i + 2) : nullptr, angles ? data(i + 1) : nullptr};
  };
  const Pairs<A> s = pairs(0), t = pairs(each);
  double value = 0;
  DistanceTerm<A> distance;
  const auto fill = [&](auto wide) {
    fill_pairs<A, decltype(wide)>(matrix(student), student.size(1), s);
    fill_pairs<A, decltype(wide)>(matrix(teacher), teacher.size(1), t);
  };
  angles ? fill(double{}) : fill(A{});
  if (distance_weight != 0) value += distance.forward(s, t, distance_weight);
  A* grad_ij = angles && grad ? data(2 * each) : nullptr;
  const double scale = angle_weight * 2 / (double(rows) * rows * rows);
  if (grad_ij) std::fill(grad_ij, grad_ij + rows * stride, A(0));
  if (angles) value += scale * angle_loss(s, t, grad_ij, grad);
  if (grad) finish_grad(s, t, distance_weight != 0 ? &distance : nullptr, grad_ij, A(2 * scale), grad);
  *loss = static_cast<A>(value);
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void distances(const Tensor& x, const std::optional<Tensor>& y, bool squared, A* out) const {
    const Matrix other = matrix(y);
    const int64_t n = x.size(0), m = y ? y->size(0) : n;
    write_distances<A>(matrix(x), n, y ? &other : nullptr, m, x.size(1), squared, out);
  }

  template <class A>
  void weighted_differences(const Tensor& weights, const Tensor& x, const Tensor& y, const Column& factor,
                            const Tensor& out) const {
    write_weighted_differences(weights, matrix(x), matrix(y), x.size(1), factor.data ? read<A>(factor, 0) : A(1),
                               matrix(out));
  }

  template <class A>
  void rkd(const Tensor& student, const Tensor& teacher, double distance_weight, double angle_weight, const Tensor&,
           A* grad, A* loss) const {
    const int64_t rows = student.size(0);
    if (rows >= 2) return rkd_rows(student, teacher, distance_weight, angle_weight, grad, loss);
    *loss = 0;  // no pair
    if (grad) std::fill(grad, grad + rows * rows, A(0));
  }
};

}  // namespace
}  // namespace pairwise
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::pairwise::register_ops<kdfast::pairwise::Cpu>(m); }
