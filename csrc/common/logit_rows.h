// Rows of logits on the CPU: loops over rows in parallel, and vectorised loops over a piece of a row.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "common/chunk.h"
#include "common/networks.h"
#include "common/parallel.h"
#include "common/softmax.h"
#include "common/vector_loop.h"

namespace kdfast {

// ---- rows

// Logits that are worth a thread: fewer take less time than to wake one.
constexpr int64_t kLogitGrain = 16384;

// Rows that are worth a thread.
inline int64_t row_grain(int64_t cols) { return std::max<int64_t>(1, kLogitGrain / std::max<int64_t>(cols, 1)); }

// f(row) for every row, in parallel.
template <class F>
void for_rows(int64_t rows, int64_t cols, const F& f) {
  for_each(rows, row_grain(cols), f);
}

// One row of logits.
template <class A>
struct Row {
  const Matrix& m;
  int64_t row;
  A* buffer;

  const A* piece(int64_t begin, int64_t n) const { return read<A>(m, row, begin, n, buffer); }
  A at(int64_t col) const { return read_one<A>(m, row, col); }
};

// f(begin, n) for the pieces of a row, without the class `skipped` if that is not negative.
template <class F>
void for_row_pieces(int64_t cols, int64_t skipped, const F& f) {
  if (skipped < 0) return for_pieces(0, cols, f);
  for_pieces(0, skipped, f);
  for_pieces(skipped + 1, cols, f);
}

// A gradient of zeros, where one is needed.
template <class A>
void write_zeros(const Matrix& to, int64_t row, int64_t cols) {
  if (!to.data) return;
  alignas(64) A buffer[kChunk];
  for_pieces(0, cols, [&](int64_t begin, int64_t n) {
    A* out = target(to, row, begin, buffer);
    std::fill(out, out + n, A(0));
    write(to, row, begin, n, out);
  });
}

// Scratch memory of one thread, in pieces of kChunk elements. The padding of a few cache lines keeps equal offsets of
// different pieces out of the same cache set.
constexpr int64_t kPieceStride = kChunk + 5 * 16;

template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t pieces)
      : memory_(static_cast<A*>(::operator new[](pieces * kPieceStride * sizeof(A), std::align_val_t(64)))) {}
  A* piece(int64_t i) const { return memory_.get() + i * kPieceStride; }

 private:
  struct Deleter {
    void operator()(A* x) const { ::operator delete[](x, std::align_val_t(64)); }
  };
  std::unique_ptr<A[], Deleter> memory_;
};

// f(row, scratch) for every row of `networks` networks, in parallel.
template <class A, class F>
void for_rows(int64_t rows, int64_t cols, int64_t networks, int64_t pieces, const F& f) {
  for_ranges(rows, row_grain(cols * networks), [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch(pieces);
    for (int64_t row = begin; row < end; ++row) f(row, scratch);
  });
}

// A piece of every network in one row.
template <class A>
struct NetworkPieces {
  const A* z[kMaxNetworks];

  void read(const Networks& networks, int64_t row, int64_t begin, int64_t n, const Scratch<A>& scratch, int64_t first) {
    for (int64_t m = 0; m < networks.count; ++m) {
      z[m] = kdfast::read<A>(networks[m], row, begin, n, scratch.piece(first + m));
    }
  }
};

// f(first, constant count) for kMany of `count` things at a time, and then for those that are left.
template <int kMany, class F>
void for_some(int64_t first, int64_t count, const F& f) {
  for (; first + kMany <= count; first += kMany) f(first, std::integral_constant<int, kMany>{});
  if constexpr (kMany > 1) for_some<kMany - 1>(first, count, f);
}

// value(row) of all rows: their sum, or one by one.
template <class A, class F>
void reduce_rows(int64_t rows, bool reduce, A* out, const F& value) {
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const A v = value(row);
    if (!reduce) out[row] = v;
    sum += v;
  }
  if (reduce) *out = static_cast<A>(sum);
}

// ---- pieces of a row

// The sum of the exponentials at T. kKeep: also writes them to e.
template <bool kKeep, class A>
A exponential_sum(const A* z, int64_t n, A max, A rate, A* e) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED {
    const A power = exp2((z[i] - max) * rate);
    if (kKeep) e[i] = power;
    return power;
  });
}

template <class A>
struct ExponentialSums {
  A at_t, at_1;  // at temperatures T and 1
};

// The same at both temperatures.
template <int kT, bool kKeep, class A>
ExponentialSums<A> exponential_sums(const A* z, int64_t n, A max, A rate, A* e) {
  const auto sums = sum_elements<2, A>(n, [&](int64_t i) KD_INLINED {
    const A c = z[i] - max, power = exp2(c * rate);
    if (kKeep) e[i] = power;
    return Terms<A>{power, exp_1<kT>(power, c)};
  });
  return {sums.a, sums.b};
}

template <class A>
void write_exponentials(const A* z, int64_t n, A max, A rate, A* e) {
  for_elements<A>(n, [&](int64_t i) KD_INLINED { e[i] = exp2((z[i] - max) * rate); });
}

// KL(p || q) of near distributions, in nats.
template <class A>
A near_sum(const A* z_p, const A* z_q, int64_t n, NearRow<A> row) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED { return row.term(z_p[i], z_q[i]); });
}

// The softmax of a row, without the class `skipped` if that is not negative. kKeep: `e` holds the exponentials of its
// last piece; that is all of them where the row has one piece.
template <bool kKeep, class A>
Softmax<A> softmax_sweep(const Row<A>& z, int64_t cols, int64_t skipped, A rate, A* e) {
  A max = -infinity<A>();
  double sum = 0;
  for_row_pieces(cols, skipped, [&](int64_t begin, int64_t n) {
    const A *piece = z.piece(begin, n), top = max_of(piece, n, max);
    if (top > max) sum *= exp2((double(max) - top) * rate);
    max = top;
    sum += exponential_sum<kKeep>(piece, n, finite_max(max), rate, e);
  });
  return {finite_max(max), static_cast<A>(sum)};
}

}  // namespace kdfast
