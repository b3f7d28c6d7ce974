#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "common/chunk.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/vector_loop.h"
#include "gram/host.h"

namespace kdfast {
namespace gram {
namespace {

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// One matrix of a batch [Z, n, m].
Matrix matrix_of(const Tensor& x, int64_t z) {
  const int64_t offset = z * x.stride(0) * static_cast<int64_t>(x.element_size());
  return {static_cast<char*>(x.data_ptr()) + offset, x.scalar_type(), x.stride(1), x.stride(2)};
}

// Some rows and columns of a matrix as A, in whole vectors: in place, or copied with zeros beyond its end.
template <class A>
struct Panel {
  const A* data;
  int64_t stride;
};

template <class A>
bool in_place(const Matrix& m, int64_t width) {
  return m.dtype == kDtype<A> && m.col_stride == 1 && width % kLanesOf<A> == 0;
}

// Rows [row, row + height), columns [col, col + width); the buffer has `stride` columns. `copied`: in any case.
template <class A>
Panel<A> panel(const Matrix& m, int64_t row, int64_t height, int64_t col, int64_t width, int64_t stride, A* buffer,
               bool copied = false) {
  const int64_t offset = row * m.row_stride + col * m.col_stride;
  if (!copied && in_place<A>(m, width)) return {static_cast<const A*>(m.data) + offset, m.row_stride};
  const int64_t end = blocks_of(width, kLanesOf<A>) * kLanesOf<A>;
  dispatch_float(m.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(m.data) + offset;
    for (int64_t r = 0; r < height; ++r) {
      widen(from + r * m.row_stride, m.col_stride, width, buffer + r * stride);
      std::fill(buffer + r * stride + width, buffer + r * stride + end, A(0));
    }
  });
  return {buffer, stride};
}

// ---- inner products of rows
constexpr int64_t kBlock = 32, kDepth = 1024;  // rows of a block; columns of a panel
constexpr int64_t kGroup = 36;                 // blocks of products that take turns at panels, which so stay in a cache

// block[i][j] += x[i] . y[j] over n columns, i < rows, j < cols; with `upper` only of tiles on and above the diagonal.
template <class A>
KD_NOT_INLINED void add_inner(Panel<A> x, Panel<A> y, int64_t rows, int64_t cols, int64_t n, bool upper, A* block) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const A* x_row[kTileRows];
    for (int64_t a = 0; a < kTileRows; ++a) x_row[a] = x.data + std::min(i + a, rows - 1) * x.stride;
    for (int64_t j = upper ? i : 0; j < cols; j += kTileRows) {
      const A* y_row[kTileRows];
      for (int64_t b = 0; b < kTileRows; ++b) y_row[b] = y.data + std::min(j + b, cols - 1) * y.stride;
      A sums[kTileRows][kTileRows];
      tile_sums(x_row, y_row, n, [](auto sum, auto own, auto other) KD_INLINED { return sum + own * other; }, sums);
      for (int64_t a = 0; a < kTileRows; ++a) {
        for (int64_t b = 0; b < kTileRows; ++b) block[(i + a) * kBlock + j + b] += sums[a][b];
      }
    }
  }
}

// out [Z, n, m] = x_i . y_j; without y, of x with itself: half of the work.
template <class A>
void write_inner(const Tensor& x, const Tensor* y, A* out) {
  const int64_t n = x.size(1), m = y ? y->size(1) : n, dim = x.size(2);
  const int64_t down = blocks_of(n, kBlock), across = blocks_of(m, kBlock);
  const int64_t each = y ? down * across : down * (down + 1) / 2;
  // f(z, i0, j0, rows, cols, whether both are the same rows) of a block
  const auto with_block = [&](int64_t task, const auto& f) {
    int64_t i = task % each, j = 0;
    if (y) {
      j = i % across;
      i /= across;
    } else {  // the i-th pair of blocks i <= j
      while (i > j) i -= ++j;
    }
    const int64_t i0 = i * kBlock, j0 = j * kBlock;
    f(task / each, i0, j0, std::min(kBlock, n - i0), std::min(kBlock, m - j0), !y && i == j);
  };
  for_ranges(x.size(0) * each, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer, blocks;
    for (int64_t first = begin; first < end; first += kGroup) {
      const int64_t count = std::min(kGroup, end - first);
      blocks.assign(count * kBlock * kBlock, A(0));
      for (int64_t c = 0, width; c < dim; c += width) {
        width = std::min(kDepth, dim - c);
        if (width > kLanesOf<A>) width = width / kLanesOf<A> * kLanesOf<A>;  // the rest is a panel of its own
        for (int64_t t = 0; t < count; ++t) {
          with_block(first + t, [&](int64_t z, int64_t i0, int64_t j0, int64_t rows, int64_t cols, bool same) {
            const Matrix own = matrix_of(x, z), other = y ? matrix_of(*y, z) : own;
            const bool copies = !in_place<A>(own, width) || !in_place<A>(other, width);
            if (copies && buffer.empty()) buffer.resize(2 * kBlock * kDepth);
            const Panel<A> a = panel(own, i0, rows, c, width, kDepth, buffer.data());
            const Panel<A> b = same ? a : panel(other, j0, cols, c, width, kDepth, buffer.data() + kBlock * kDepth);
            add_inner(a, b, rows, cols, width, same, blocks.data() + t * kBlock * kBlock);
          });
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        with_block(first + t, [&](int64_t z, int64_t i0, int64_t j0, int64_t rows, int64_t cols, bool same) {
          const A* block = blocks.data() + t * kBlock * kBlock;
          A* to = out + z * n * m;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t s = 0; s < cols; ++s) {
              const bool mirrored = same && s < r;  // in a tile below the diagonal
              to[(i0 + r) * m + j0 + s] = mirrored ? block[s * kBlock + r] : block[r * kBlock + s];
            }
          }
          if (y || same) return;
          for (int64_t s = 0; s < cols; ++s) {
            for (int64_t r = 0; r < rows; ++r) to[(j0 + s) * m + i0 + r] = block[r * kBlock + s];
          }
        });
      }
    }
  });
}

// ---- weighted sums of rows

// Sums in memory, overwritten or accumulated into, and then multiplied by `scale`.
template <class A>
struct Sums {
  A* data;
  int64_t stride;
  bool overwrite;
  A scale;
};

// out[i] += sum over n rows j of w[i][j] x[j], for `rows` of kTileRows rows i and kV registers of columns.
template <class A, int64_t kV>
KD_HD void add_weighted_tile(const A* const (&w)[kTileRows], int64_t col_stride, const A* x, int64_t x_stride,
                             int64_t n, int64_t rows, const Sums<A>& out) {
  constexpr int64_t kWidth = kRegisterOf<A>;
  Register<A> sum[kTileRows][kV] = {};
  if (!out.overwrite) {
    for (int64_t a = 0; a < std::min(rows, kTileRows); ++a) {
      for (int64_t v = 0; v < kV; ++v) sum[a][v] = load_register(out.data + a * out.stride + v * kWidth);
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    Register<A> row[kV];
    for (int64_t v = 0; v < kV; ++v) row[v] = load_register(x + j * x_stride + v * kWidth);
    for (int64_t a = 0; a < kTileRows; ++a) {
      const Register<A> weight = fill_register(w[a][j * col_stride]);
      for (int64_t v = 0; v < kV; ++v) sum[a][v] += weight * row[v];
    }
  }
  const Register<A> scale = fill_register(out.scale);
  for (int64_t a = 0; a < std::min(rows, kTileRows); ++a) {
    for (int64_t v = 0; v < kV; ++v) store_register<A>(out.data + a * out.stride + v * kWidth, sum[a][v] * scale);
  }
}

// The same for `rows` rows i and `width` columns in whole lanes.
template <class A>
void add_weighted(const A* weights, int64_t row_stride, int64_t col_stride, int64_t rows, const A* x, int64_t x_stride,
                  int64_t n, int64_t width, const Sums<A>& out) {
  constexpr int64_t kV = kRegisters / 8, kWide = kV * kRegisterOf<A>;
  for (int64_t c = 0; c < width;) {
    const bool wide = c + kWide <= width;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const A* w[kTileRows];
      for (int64_t a = 0; a < kTileRows; ++a) w[a] = weights + std::min(i + a, rows - 1) * row_stride;
      const Sums<A> to{out.data + i * out.stride + c, out.stride, out.overwrite, out.scale};
      if (wide) {
        add_weighted_tile<A, kV>(w, col_stride, x + c, x_stride, n, rows - i, to);
      } else {
        add_weighted_tile<A, 1>(w, col_stride, x + c, x_stride, n, rows - i, to);
      }
    }
    c += wide ? kWide : kRegisterOf<A>;
  }
}

// Rows of the result and of x, and columns, of a tile. Few registers go through the rows of x in narrow columns, which
// have to be neighbours then: lines that far apart share a few sets of the cache.
constexpr bool kCopied = kRegisters < 32;
constexpr int64_t kTall = kCopied ? 256 : 64, kAcross = kCopied ? 128 : 256;

template <class A>
void write_weighted(const Tensor& weights, const Tensor& x, A factor, const Tensor& out) {
  const int64_t batch = weights.size(0), n = weights.size(1), m = weights.size(2), dim = x.size(2);
  const int64_t down = blocks_of(n, kTall), across = blocks_of(dim, kAcross);
  for_each(batch * down * across, 1, [&](int64_t task) {  // column by column, whose part of x stays in a cache
    const int64_t z = task / (down * across), c0 = task / down % across * kAcross, i0 = task % down * kTall;
    const int64_t rows = std::min(kTall, n - i0), width = std::min(kAcross, dim - c0);
    const int64_t filled = blocks_of(width, kLanesOf<A>) * kLanesOf<A>;
    const Matrix from = matrix_of(x, z), to = matrix_of(out, z);
    const A* w = static_cast<const A*>(weights.data_ptr()) + z * weights.stride(0) + i0 * weights.stride(1);
    const bool direct = in_place<A>(to, width);
    std::vector<A> buffer(!kCopied && in_place<A>(from, width) ? 0 : kTall * kAcross),
        held(direct ? 0 : kTall * kAcross);
    A* sums = direct ? static_cast<A*>(to.data) + i0 * to.row_stride + c0 : held.data();
    for (int64_t j0 = 0; j0 == 0 || j0 < m; j0 += kTall) {
      const int64_t height = std::min(kTall, m - j0);
      const Panel<A> p = panel(from, j0, height, c0, width, kAcross, buffer.data(), kCopied);
      const Sums<A> these{sums, direct ? to.row_stride : kAcross, j0 == 0, j0 + height == m ? factor : A(1)};
      add_weighted(w + j0 * weights.stride(2), weights.stride(1), weights.stride(2), rows, p.data, p.stride, height,
                   filled, these);
    }
    if (direct) return;
    for (int64_t i = 0; i < rows; ++i) write(to, i0 + i, c0, width, sums + i * kAcross);
  });
}

// ---- comparisons
constexpr int64_t kEntryGrain = 4096;  // entries that are worth a thread, each with divisions or a logarithm

template <class A>
double sum_squares(const A* x, int64_t n) {
  return sum_each<double>(n, [&](int64_t j) KD_INLINED {
    const double wide = x[j];
    return wide * wide;
  });
}

// Each fills the statistics of row i and gives its loss; g and h are the row in both matrices.
template <class A, bool kAbsolute>
double compare_row(const Rows<A, kAbsolute>& f, const A* g, const A* h, int64_t i, int64_t n, Stats<A> stats) {
  using F = Rows<A, kAbsolute>;
  f.norms(sum_squares(g, n), sum_squares(h, n), i, stats);
  const A inverse_s = stats.get(F::kInverseS, i), inverse_t = stats.get(F::kInverseT, i);
  const auto sums = sum_elements<3, double>(n, [&](int64_t j) KD_INLINED {
    const A gap = f.gap(g[j], h[j], i, stats), slope = f.slope(gap);
    return Terms<double>{f.entry(gap), slope * (g[j] * inverse_s), -slope * (h[j] * inverse_t)};
  });
  const bool floored_s = inverse_s * A(kSmallestNorm) >= 1, floored_t = inverse_t * A(kSmallestNorm) >= 1;
  stats.put(F::kAlongS, i, floored_s ? A(0) : static_cast<A>(sums.b));
  stats.put(F::kAlongT, i, floored_t ? A(0) : static_cast<A>(sums.c));
  return sums.a;
}

template <class A>
double compare_row(const Distribution<A>& f, const A* g, const A* h, int64_t i, int64_t n, Stats<A> stats) {
  using F = Distribution<A>;
  const auto totals = sum_elements<2, double>(n, [&](int64_t j) KD_INLINED {
    return Terms<double>{f.sum_term(kStudent, g[j], i, j, stats), f.sum_term(kTeacher, h[j], i, j, stats)};
  });
  const A over_s = static_cast<A>(1 / totals.a), over_t = static_cast<A>(1 / totals.b);
  const auto sums = sum_elements<3, double>(n, [&](int64_t j) KD_INLINED {
    const A p = f.sum_term(kStudent, g[j], i, j, stats) * over_s, t = f.sum_term(kTeacher, h[j], i, j, stats) * over_t;
    A slope_s, slope_t;
    const A entry = f.entry(p, t, slope_s, slope_t);
    return Terms<double>{entry, slope_s * p, slope_t * t};
  });
  stats.put(F::kOverS, i, over_s);
  stats.put(F::kOverT, i, over_t);
  stats.put(F::kAlongS, i, static_cast<A>(sums.b));
  stats.put(F::kAlongT, i, static_cast<A>(sums.c));
  return sums.a;
}

template <class A, int kTerms>
double compare_row(const Cosines<A, kTerms>& f, const A* g, const A* h, int64_t i, int64_t n, Stats<A> stats) {
  return sum_each<double>(n, [&](int64_t j) KD_INLINED {
    A slope_s, slope_t;
    return f.entry(g[j], h[j], i, j, stats, slope_s, slope_t);
  });
}

template <Side kSide, class A, class F>
void weigh_row(const F& f, const A* g, const A* h, int64_t i, int64_t n, Stats<A> stats, A* weights) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) weights[j] = f.weight(kSide, g[j], h[j], i, j, stats);
}

template <class A>
double dot(const A* x, const A* y, int64_t n) {
  return sum_each<double>(n,
                          [&](int64_t j) KD_INLINED { return static_cast<double>(x[j]) * static_cast<double>(y[j]); });
}

template <class A, class F>
double compare(const F& f, const Tensor& student, const Tensor& teacher, A* const (&weights)[2]) {
  const int64_t n = student.size(1), rows = student.size(0) * n,
                grain = std::max<int64_t>(1, kEntryGrain / std::max<int64_t>(n, 1));
  Tensor memory = empty(student, kDtype<A>, {kStats, rows});
  const A* grams[2] = {static_cast<const A*>(student.data_ptr()), static_cast<const A*>(teacher.data_ptr())};
  const auto stats_of = [&](int64_t row) { return Stats<A>{static_cast<A*>(memory.data_ptr()), rows, row / n * n}; };
  if constexpr (F::kCosines) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int side = 0; side < 2; ++side) {
        stats_of(0).put(F::kInverseS + side, row, inverse_norm(grams[side][row * n + row % n], f.eps));
      }
    }
  }
  std::vector<double> losses(rows);
  for_each(rows, grain, [&](int64_t row) {
    losses[row] = compare_row(f, grams[0] + row * n, grams[1] + row * n, row % n, n, stats_of(row));
  });
  for_each(rows, grain, [&](int64_t row) {
    for (const Side side : {kStudent, kTeacher}) {
      A* to = weights[side] + row * n;
      if (!weights[side]) continue;
      const auto weigh = side == kStudent ? weigh_row<kStudent, A, F> : weigh_row<kTeacher, A, F>;
      weigh(f, grams[0] + row * n, grams[1] + row * n, row % n, n, stats_of(row), to);
      if constexpr (F::kCosines) {
        const A* g = grams[side] + row * n;
        const A norm = norm_of(g[row % n]), inverse = stats_of(row).get(F::kInverseS + side, row % n);
        if (norm > 0) to[row % n] -= static_cast<A>(dot(to, g, n)) * inverse / norm;
      }
    }
  });
  double loss = 0;
  for (double x : losses) loss += x;
  return f.scale * loss;
}

// ---- affinity of positions. Blocks of positions are compared pair by pair; a task adds to both blocks' gradients.
constexpr int64_t kPositions = 64;
constexpr int64_t kPositionGrain = 256;  // positions that are worth a thread, which scales all their channels

// One network: unit positions u, channel by channel [B, channels, padded positions] and position by position
// [B, padded positions, padded channels], and their gradient (or null) in the second order.
template <class A>
struct Network {
  int64_t channels, padded_channels, positions, padded_positions;
  A *by_channel, *by_position, *grad;

  A* channel_rows(int64_t b) const { return by_channel + b * channels * padded_positions; }
  A* position_rows(A* base, int64_t b, int64_t n) const { return base + (b * padded_positions + n) * padded_channels; }
};

// x[c] of `stride` positions each -> |x| of n of them.
template <class A>
void position_norms(const A* x, int64_t stride, int64_t channels, int64_t n, A* norms) {
  A sum[kPositions] = {};
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < n; ++i) sum[i] += x[c * stride + i] * x[c * stride + i];
  }
  for (int64_t i = 0; i < n; ++i) norms[i] = std::sqrt(sum[i]);
}

template <class A>
void write_units(const Tensor& x, A eps, const Network<A>& net) {
  const int64_t blocks = net.padded_positions / kPositions;
  for_each(x.size(0) * blocks, 1, [&](int64_t task) {
    const int64_t b = task / blocks, n0 = task % blocks * kPositions, n = std::min(kPositions, net.positions - n0);
    const Matrix from = matrix_of(x, b);
    A* rows = net.channel_rows(b) + n0;
    dispatch_float(from.dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* data = static_cast<const T*>(from.data) + n0 * from.col_stride;
      for (int64_t c = 0; c < net.channels; ++c) {
        widen(data + c * from.row_stride, from.col_stride, n, rows + c * net.padded_positions);
        std::fill(rows + c * net.padded_positions + n, rows + c * net.padded_positions + kPositions, A(0));
      }
    });
    A norms[kPositions];
    position_norms(rows, net.padded_positions, net.channels, kPositions, norms);
    for (A& norm : norms) norm = 1 / (norm + (norm > 0 ? eps : A(1)));
    for (int64_t c = 0; c < net.channels; ++c) {
      for (int64_t i = 0; i < kPositions; ++i) rows[c * net.padded_positions + i] *= norms[i];
    }
    if (!net.grad) return;
    for (int64_t i = 0; i < kPositions; ++i) {
      A* to = net.position_rows(net.by_position, b, n0 + i);
      for (int64_t c = 0; c < net.channels; ++c) to[c] = rows[c * net.padded_positions + i];
      std::fill(to + net.channels, to + net.padded_channels, A(0));
    }
  });
}

// products := slopes; -> the sum of the entries
template <class F, class A>
A write_slopes(const F& f, A* s, A* t) {
  return sum_each<A>(kPositions * kPositions, [&](int64_t i) KD_INLINED {
    A of_s, of_t;
    const A entry = f.entry(s[i], t[i], of_s, of_t);
    s[i] = of_s;
    if (!F::kOneSlope) t[i] = of_t;
    return entry;
  });
}

template <class F, class A>
double affinity_block(const F& f, const Network<A> (&nets)[2], int64_t b, int64_t i0, int64_t j0) {
  alignas(64) A products[2][kPositions * kPositions];
  for (int side = 0; side < 2; ++side) {
    const Network<A>& net = nets[side];
    const A* u = net.channel_rows(b);
    add_weighted(u + i0, 1, net.padded_positions, kPositions, u + j0, net.padded_positions, net.channels, kPositions,
                 Sums<A>{products[side], kPositions, true, A(1)});
  }
  const double loss = write_slopes(f, products[0], products[1]);
  for (int side = 0; side < 2; ++side) {
    const Network<A>& net = nets[side];
    if (!net.grad) continue;
    const A* slopes = products[F::kOneSlope ? 0 : side];
    const int64_t width = net.padded_channels;
    A *u_i = net.position_rows(net.by_position, b, i0), *u_j = net.position_rows(net.by_position, b, j0);
    const Sums<A> grad_i{net.position_rows(net.grad, b, i0), width, false, A(1)};
    const Sums<A> grad_j{net.position_rows(net.grad, b, j0), width, false, A(1)};
    add_weighted(slopes, kPositions, 1, kPositions, u_j, width, kPositions, width, grad_i);
    if (i0 != j0) add_weighted(slopes, 1, kPositions, kPositions, u_i, width, kPositions, width, grad_j);
  }
  return i0 == j0 ? loss : 2 * loss;
}

// The sum of the entries of all pairs of positions. A round-robin schedule whose first round is the diagonal: in each
// round no block appears twice, so its gradient accumulates in one order, whatever the number of threads.
template <class F, class A>
double affinity_sum(const F& f, const Network<A> (&nets)[2], int64_t batch) {
  const int64_t blocks = nets[0].padded_positions / kPositions, players = blocks + blocks % 2;
  std::vector<double> losses(batch * blocks * blocks);
  const auto run = [&](int64_t b, int64_t i, int64_t j) {
    losses[(b * blocks + i) * blocks + j] = affinity_block(f, nets, b, i * kPositions, j * kPositions);
  };
  for_each(batch * blocks, 1, [&](int64_t task) { run(task / blocks, task % blocks, task % blocks); });
  for (int64_t round = 0; round < players - 1; ++round) {
    for_each(batch * (players / 2), 1, [&](int64_t task) {
      const int64_t m = task % (players / 2), i = (round + m) % (players - 1);
      const int64_t j = m == 0 ? players - 1 : (round - m + players - 1) % (players - 1);
      if (std::max(i, j) < blocks) run(task / (players / 2), std::min(i, j), std::max(i, j));
    });
  }
  double sum = 0;
  for (double x : losses) sum += x;
  return sum;
}

// grad / (|x| + eps) (slope - (slope . x) / ((|x| + eps) |x|) x) of n positions; x and out channel by channel.
template <class A>
void finish_positions(const A* slope, A* x, int64_t channels, int64_t n, A eps, A grad) {
  A norms[kPositions], along[kPositions] = {}, inverse[kPositions];
  position_norms(x, kPositions, channels, n, norms);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < n; ++i) along[i] += slope[i * channels + c] * x[c * kPositions + i];
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool some = norms[i] > 0;
    inverse[i] = some ? 1 / (norms[i] + eps) : A(0);
    along[i] = some ? along[i] * inverse[i] / norms[i] : A(0);
    inverse[i] *= grad;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < n; ++i) {
      x[c * kPositions + i] = inverse[i] * (slope[i * channels + c] - along[i] * x[c * kPositions + i]);
    }
  }
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void inner_products(const Tensor& a, const std::optional<Tensor>& b, const Tensor& out) const {
    write_inner(a, b ? &*b : nullptr, data<A>(out));
  }

  template <class A>
  void weighted_sums(const Tensor& weights, const Tensor& x, const Column& factor, const Tensor& out) const {
    write_weighted<A>(weights, x, factor.data ? read<A>(factor, 0) : A(1), out);
  }

  template <class F, class A>
  void compare(const F& f, const Tensor& student, const Tensor& teacher, A* const (&weights)[2],
               const Tensor& loss) const {
    *data<A>(loss) = static_cast<A>(gram::compare<A>(f, student, teacher, weights));
  }

  template <class F, class A>
  void affinity(const F& f, const std::array<Tensor, 2>& networks, double eps, A* const (&slopes)[2],
                const Tensor& loss) const {
    const int64_t batch = networks[0].size(0), positions = networks[0].size(2);
    const int64_t padded_positions = blocks_of(positions, kPositions) * kPositions;
    std::vector<Tensor> memory;
    const auto allocate = [&](std::vector<int64_t> shape) {
      memory.push_back(empty(loss, kDtype<A>, shape));
      return data<A>(memory.back());
    };
    Network<A> nets[2];
    for (int side = 0; side < 2; ++side) {
      const int64_t channels = networks[side].size(1), width = blocks_of(channels, kLanesOf<A>) * kLanesOf<A>;
      A* rows = allocate({batch, channels, padded_positions});
      A *units = nullptr, *grad = nullptr;
      if (slopes[side]) {
        units = allocate({batch, padded_positions, width});
        grad = allocate({batch, padded_positions, width});
        std::fill(grad, grad + batch * padded_positions * width, A(0));
      }
      nets[side] = {channels, width, positions, padded_positions, rows, units, grad};
      write_units(networks[side], static_cast<A>(eps), nets[side]);
    }
    const double scale = 1 / std::max<double>(1, static_cast<double>(batch) * positions * positions);
    *data<A>(loss) = static_cast<A>(scale * affinity_sum(f, nets, batch));
    for (int side = 0; side < 2; ++side) {
      const Network<A>& net = nets[side];
      // s_ij and s_ji are the same number.
      const A factor = static_cast<A>(side ? -2 * scale : 2 * scale);
      for_each(net.grad ? batch * positions : 0, kPositionGrain, [&](int64_t row) {
        const A* grad = net.position_rows(net.grad, row / positions, row % positions);
        for (int64_t c = 0; c < net.channels; ++c) slopes[side][row * net.channels + c] = factor * grad[c];
      });
    }
  }

  template <class A>
  void affinity_backward(const Column& upstream, const Tensor& slope, const Tensor& x, A eps, const Tensor& out) const {
    const int64_t batch = x.size(0), channels = x.size(1), positions = x.size(2);
    const int64_t blocks = blocks_of(positions, kPositions);
    for_each(batch * blocks, 1, [&](int64_t task) {
      const int64_t b = task / blocks, n0 = task % blocks * kPositions, n = std::min(kPositions, positions - n0);
      const Matrix from = matrix_of(x, b), to = matrix_of(out, b);
      std::vector<A> own(channels * kPositions);
      for (int64_t c = 0; c < channels; ++c) {
        dispatch_float(from.dtype, [&](auto type) {
          using T = decltype(type);
          const T* data = static_cast<const T*>(from.data) + c * from.row_stride + n0 * from.col_stride;
          widen(data, from.col_stride, n, own.data() + c * kPositions);
        });
      }
      const A* slopes = data<const A>(slope) + (b * positions + n0) * channels;
      finish_positions(slopes, own.data(), channels, n, eps, read<A>(upstream, 0));
      for (int64_t c = 0; c < channels; ++c) write(to, c, n0, n, own.data() + c * kPositions);
    });
  }
};

}  // namespace
}  // namespace gram
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::gram::register_ops<kdfast::gram::Cpu>(m); }
