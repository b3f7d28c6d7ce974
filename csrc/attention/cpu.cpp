#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "attention/host.h"
#include "common/chunk.h"
#include "common/parallel.h"
#include "common/vector_loop.h"

namespace kdfast {
namespace attention {
namespace {

constexpr int64_t kElementGrain = 16384;  // elements that are worth a thread: fewer take less time than to wake one

// One sample of x [B, C, N] as a matrix of channels, or (`last`) of positions.
Matrix sample(const Tensor& x, int64_t b, bool last) {
  const int64_t offset = b * x.stride(0) * static_cast<int64_t>(x.element_size());
  return {static_cast<char*>(x.data_ptr()) + offset, x.scalar_type(), x.stride(last ? 2 : 1), x.stride(last ? 1 : 2)};
}

// Whether rows are read and written where they lie, rather than through a buffer.
template <class A>
bool in_place(const Matrix& m) {
  return m.dtype == kDtype<A> && m.col_stride == 1;
}

// Row and columns [col, col + n) of a matrix that does not lie as A, as A.
template <class A>
void copy(const Matrix& m, int64_t row, int64_t col, int64_t n, A* to) {
  dispatch_float(m.dtype, [&](auto tag) {
    using T = decltype(tag);
    widen(static_cast<const T*>(m.data) + row * m.row_stride + col * m.col_stride, m.col_stride, n, to);
  });
}

// ---- maps. A task is one sample's piece of positions, whose sums stay in the L1 cache over all channels.
constexpr int64_t kUnroll = 4;  // long channels that are added to the sums together; short ones one by one

template <int P, class A>
void add_channels(const A* x, int64_t stride, int64_t channels, int64_t n, int64_t p, A* sum) {
  int64_t c = 0;
  for (; n >= kChunk && c + kUnroll <= channels; c += kUnroll, x += kUnroll * stride) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      sum[i] += (power<P>(x[i], p) + power<P>(x[stride + i], p)) +
                (power<P>(x[2 * stride + i], p) + power<P>(x[3 * stride + i], p));
    }
  }
  for (; c < channels; ++c, x += stride) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += power<P>(x[i], p);
  }
}

template <int P, class A>
A sum_powers(const A* x, int64_t n, int64_t p) {
  return sum_each<A>(n, [&](int64_t i) KD_INLINED { return power<P>(x[i], p); });
}

// sum [positions] += those at [begin, end) of the channels of m [C, N].
template <int P, class A>
void add_rows(const Matrix& m, int64_t channels, int64_t begin, int64_t end, int64_t p, A* sum) {
  if (in_place<A>(m)) {
    const A* x = static_cast<const A*>(m.data) + begin;
    return add_channels<P>(x, m.row_stride, channels, end - begin, p, sum + begin);
  }
  alignas(64) A buffer[kUnroll * kChunk];
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t n = std::min(kChunk, end - at);
    for (int64_t c = 0; c < channels; c += kUnroll) {
      const int64_t rows = std::min(kUnroll, channels - c);
      for (int64_t r = 0; r < rows; ++r) copy(m, c + r, at, n, buffer + r * kChunk);
      add_channels<P>(buffer, kChunk, rows, n, p, sum + at);
    }
  }
}

// sum = that over row n of m [N, C].
template <int P, class A>
A sum_row(const Matrix& m, int64_t n, int64_t channels, int64_t p) {
  if (in_place<A>(m)) return sum_powers<P>(static_cast<const A*>(m.data) + n * m.row_stride, channels, p);
  alignas(64) A buffer[kChunk];
  A sum = 0;
  for (int64_t c = 0; c < channels; c += kChunk) {
    const int64_t width = std::min(kChunk, channels - c);
    copy(m, n, c, width, buffer);
    sum += sum_powers<P>(buffer, width, p);
  }
  return sum;
}

// sums [B, N] = sum over channels of x^p.
template <class A>
void write_maps(const Tensor& x, int64_t p, A* sums) {
  const int64_t batch = x.size(0), channels = x.size(1), positions = x.size(2);
  const bool last = is_channels_last(x);
  const int64_t piece = last ? std::max<int64_t>(1, kElementGrain / channels) : 4 * kChunk;
  const int64_t pieces = (positions + piece - 1) / piece;
  for_each(batch * pieces, 1, [&](int64_t task) {
    const int64_t b = task / pieces, begin = task % pieces * piece, end = std::min(begin + piece, positions);
    const Matrix m = sample(x, b, last);
    A* sum = sums + b * positions;
    dispatch_power(p, [&](auto exponent) {
      constexpr int kP = decltype(exponent)::value;
      if (last) {
        for (int64_t n = begin; n < end; ++n) sum[n] = sum_row<kP, A>(m, n, channels, p);
      } else {
        std::fill(sum + begin, sum + end, A(0));
        add_rows<kP>(m, channels, begin, end, p, sum);
      }
    });
  });
}

// ---- the loss of one sample, and its slopes in place of the maps
template <class A>
double sum_squares(const A* x, int64_t n) {
  return sum_each<double>(n, [&](int64_t i) KD_INLINED {
    const double wide = x[i];
    return wide * wide;
  });
}

struct GapSums {
  double loss, along_s, along_t;  // sums of gap^2, q_s gap, q_t gap
};

template <class A>
GapSums sum_gaps(const A* m_s, const A* m_t, int64_t n, Norms<A> norms) {
  const auto sums = sum_elements<3, double>(n, [&](int64_t i) KD_INLINED {
    const double gap = norms.gap(m_s[i], m_t[i]), q_s = m_s[i] * norms.inverse_s, q_t = m_t[i] * norms.inverse_t;
    return Terms<double>{gap * gap, gap * q_s, gap * q_t};
  });
  return {sums.a, sums.b, sums.c};
}

template <class A>
void write_slopes(const A* m_s, const A* m_t, int64_t n, Norms<A> norms, A along_s, A along_t, A factor, A* slope_s,
                  A* slope_t) {
  for (int64_t i = 0; i < n; ++i) {
    const A gap = norms.gap(m_s[i], m_t[i]), q_s = m_s[i] * norms.inverse_s, q_t = m_t[i] * norms.inverse_t;
    if (slope_s) slope_s[i] = factor * slope(q_s, gap, along_s, norms.inverse_s);
    if (slope_t) slope_t[i] = -factor * slope(q_t, gap, along_t, norms.inverse_t);
  }
}

// ---- the gradient: slope_n x_cn^(p-1), of rows of channels or (channels last) of positions. out [rows, n]
template <int P, class A>
void scale_channels(const A* x, int64_t stride, int64_t rows, int64_t n, const A* slopes, int64_t p, A grad, A* out) {
  for (int64_t r = 0; r < rows; ++r, x += stride, out += n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = grad * slopes[i] * power<P>(x[i], p);
  }
}

template <int P, class A>
void scale_positions(const A* x, int64_t stride, int64_t rows, int64_t n, const A* slopes, int64_t p, A grad, A* out) {
  for (int64_t r = 0; r < rows; ++r, x += stride, out += n) {
    const A slope = grad * slopes[r];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = slope * power<P>(x[i], p);
  }
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void transfer(const Tensor& student, const Tensor& teacher, int64_t p, bool need_student, bool need_teacher, A* s,
                A* t, const Tensor& loss) const {
    const int64_t batch = student.size(0), positions = student.size(2);
    write_maps(student, p, s);
    write_maps(teacher, p, t);
    const double entries = std::max<double>(1, static_cast<double>(batch) * static_cast<double>(positions));
    std::vector<double> of_sample(batch);
    for_each(batch, std::max<int64_t>(1, kElementGrain / positions), [&](int64_t b) {
      A *m_s = s + b * positions, *m_t = t + b * positions;
      const Norms<A> norms(sum_squares(m_s, positions), sum_squares(m_t, positions), student.size(1), teacher.size(1));
      const GapSums sums = sum_gaps(m_s, m_t, positions, norms);
      of_sample[b] = sums.loss;
      const double along_s = norms.floored_s ? 0 : sums.along_s, along_t = norms.floored_t ? 0 : sums.along_t;
      write_slopes(m_s, m_t, positions, norms, static_cast<A>(along_s), static_cast<A>(along_t),
                   static_cast<A>(2.0 * static_cast<double>(p) / entries), need_student ? m_s : nullptr,
                   need_teacher ? m_t : nullptr);
    });
    double sum = 0;
    for (double x : of_sample) sum += x;
    *data<A>(loss) = static_cast<A>(sum / entries);
  }

  template <class A>
  void gradient(const Column& grad, const A* all_slopes, const Tensor& x, int64_t p, const Matrix& out) const {
    const bool last = is_channels_last(x);
    const int64_t positions = x.size(2), rows = x.size(last ? 2 : 1), cols = x.size(last ? 1 : 2);
    const A upstream = read<A>(grad, 0);
    const auto scale = [&](const A* from, int64_t stride, int64_t count, int64_t n, const A* slopes, A* to) {
      dispatch_power(p - 1, [&](auto exponent) {
        constexpr int kP = decltype(exponent)::value;
        (last ? scale_positions<kP, A> : scale_channels<kP, A>)(from, stride, count, n, slopes, p - 1, upstream, to);
      });
    };
    for_ranges(x.size(0) * rows, std::max<int64_t>(1, kElementGrain / cols), [&](int64_t begin, int64_t end) {
      alignas(64) A buffer[kChunk], result[kChunk];
      for (int64_t row = begin, count; row < end; row += count) {
        const int64_t b = row / rows, r = row % rows;
        const Matrix m = sample(x, b, last);
        const A* slopes = all_slopes + b * positions + (last ? r : 0);
        if (in_place<A>(m)) {
          count = std::min(end - row, rows - r);  // of one sample
          scale(static_cast<const A*>(m.data) + r * m.row_stride, m.row_stride, count, cols, slopes,
                static_cast<A*>(out.data) + row * cols);
          continue;
        }
        count = 1;
        for (int64_t at = 0; at < cols; at += kChunk) {
          const int64_t n = std::min(kChunk, cols - at);
          copy(m, r, at, n, buffer);
          scale(buffer, 0, 1, n, last ? slopes : slopes + at, result);
          write(out, row, at, n, result);
        }
      }
    });
  }
};

}  // namespace
}  // namespace attention
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::attention::register_ops<kdfast::attention::Cpu>(m); }
