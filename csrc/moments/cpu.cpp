#include <algorithm>

#include "common/lanes.h"
#include "common/map_chunk.h"
#include "common/parallel.h"
#include "moments/host.h"

namespace kdfast {
namespace moments {
namespace {

// Work is cut into pieces, the same whatever the number of threads. A piece is read from memory once: what comes back
// to it finds it in a cache.
constexpr int64_t kPiece = 64 * kChunk;                     // positions of one channel, read chunk by chunk
constexpr int64_t kBlock = 32 * 1024;                       // elements of all channels, position by position
constexpr int64_t kMinPositions = 32, kMaxPositions = 256;  // few parts beside the elements; short sums

// ---- forward

template <class A>
KD_HD A finite_or_zero(A x) {
  return Part<A>::is_finite(x) ? x : A(0);
}

// The mean of n values in one read, then their distances from it in another. The mean is that of the distances from the
// first value, so that it is exact where all are equal.
template <class A>
Part<double> measure(const A* x, int64_t n) {
  constexpr int64_t kWidth = kLanesOf<A>, kVectors = 4;
  // f(i, k) for whole vectors at i, each added to the k-th of four sums; -> where the last few values begin.
  const auto vectors = [n](const auto& f) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kVectors * kWidth <= n; i += kVectors * kWidth) {
      for (int64_t k = 0; k < kVectors; ++k) f(i + k * kWidth, k);
    }
    for (; i + kWidth <= n; i += kWidth) f(i, 0);
    return i;
  };
  const A first = finite_or_zero(x[0]), share = A(1) / static_cast<A>(n);  // the sum itself may be beyond A
  const Lanes<A> firsts = all(first), shares = all(share);
  Lanes<A> sums[kVectors], squares[kVectors];
  for (int64_t k = 0; k < kVectors; ++k) sums[k] = all(A(0));
  int64_t i =
      vectors([&](int64_t i, int64_t k) __attribute__((always_inline)) { sums[k] += shares * (load(x + i) - firsts); });
  A shift = first + lane_sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) shift += share * (x[i] - first);

  const Lanes<A> shifts = all(shift);
  for (int64_t k = 0; k < kVectors; ++k) sums[k] = squares[k] = all(A(0));
  i = vectors([&](int64_t i, int64_t k) __attribute__((always_inline)) {
    const Lanes<A> d = load(x + i) - shifts;
    sums[k] += d;
    squares[k] += d * d;
  });
  A sum = lane_sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  A square = lane_sum<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) {
    const A d = x[i] - shift;
    sum += d;
    square += d * d;
  }
  return shifted_part(static_cast<double>(n), shift, sum, square);
}

// The same for the n channels of each line.
template <class A>
void measure_lines(const A* const* lines, int64_t count, int64_t n, A* shifts, A* sums, A* squares) {
  const A share = A(1) / static_cast<A>(count);
  A* firsts = squares;  // until they are needed
  for (int64_t i = 0; i < n; ++i) shifts[i] = firsts[i] = finite_or_zero(lines[0][i]);
  for (int64_t line = 1; line < count; ++line) {
    const A* x = lines[line];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) shifts[i] += share * (x[i] - firsts[i]);
  }
  for (int64_t i = 0; i < n; ++i) sums[i] = squares[i] = 0;
  for (int64_t line = 0; line < count; ++line) {
    const A* x = lines[line];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A d = x[i] - shifts[i];
      sums[i] += d;
      squares[i] += d * d;
    }
  }
}

// parts [pieces][channels]
template <class P>
struct Parts {
  int64_t channels;
  std::vector<P> parts;

  Parts(int64_t pieces, int64_t channels) : channels(channels), parts(pieces * channels) {}
  P& at(int64_t piece, int64_t channel) { return parts[piece * channels + channel]; }

  // f(channel, part) with the sum of each channel's parts.
  template <class F>
  void merge(const F& f) {
    const int64_t pieces = channels > 0 ? static_cast<int64_t>(parts.size()) / channels : 0;
    constexpr int64_t kTile = 32;  // channels, whose parts are neighbours
    for_each((channels + kTile - 1) / kTile, grain_for(kTile * pieces), [&](int64_t task) {
      P sums[kTile] = {};
      const int64_t first = task * kTile, n = std::min(kTile, channels - first);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t c = 0; c < n; ++c) sums[c].add(at(piece, first + c));
      }
      for (int64_t c = 0; c < n; ++c) f(first + c, sums[c]);
    });
  }
};

// Channel after channel: a piece is of one channel of a sample. f(sample, channel, first, n) -> the part of a chunk.
template <class P, class F>
Parts<P> channel_parts(const Order& order, int64_t batch, const F& f) {
  const int64_t channels = order.outer, pieces = (order.inner + kPiece - 1) / kPiece;
  Parts<P> parts(batch * pieces, channels);
  for_each(batch * pieces * channels, grain_for(std::min(order.inner, kPiece)), [&](int64_t task) {
    const int64_t channel = task % channels, piece = task / channels, begin = piece % pieces * kPiece;
    const int64_t end = std::min(begin + kPiece, order.inner);
    P& part = parts.at(piece, channel);
    for (int64_t at = begin; at < end; at += kChunk) {
      part.add(f(piece / pieces, channel, channel * order.inner + at, std::min(kChunk, end - at)));
    }
  });
  return parts;
}

// Position after position: a piece is some positions, of one sample or several, with all their channels. f(first
// position, how many, parts of the channels).
template <class P, class F>
Parts<P> position_parts(const Order& order, int64_t batch, const F& f) {
  const int64_t channels = order.inner, all = batch * order.outer;
  const int64_t of_piece = std::clamp(kBlock / std::max<int64_t>(channels, 1), kMinPositions, kMaxPositions);
  Parts<P> parts((all + of_piece - 1) / of_piece, channels);
  for_each((all + of_piece - 1) / of_piece, grain_for(of_piece * channels), [&](int64_t piece) {
    const int64_t first = piece * of_piece;
    f(first, std::min(of_piece, all - first), parts.parts.data() + piece * channels);
  });
  return parts;
}

// All channels at a position, counted over the samples.
template <class A>
const A* read_line(const Map& x, const Order& order, int64_t position, A* buffer) {
  const int64_t channels = order.inner;
  return read(x, order, position / order.outer, position % order.outer * channels, channels, buffer);
}

template <class A>
Parts<Part<double>> measure(const Map& x, const Order& order, int64_t batch) {
  if (!order.by_channel) {
    return channel_parts<Part<double>>(order, batch, [&](int64_t b, int64_t, int64_t first, int64_t n) {
      alignas(64) A buffer[kChunk];
      return measure(read(x, order, b, first, n, buffer), n);
    });
  }
  return position_parts<Part<double>>(order, batch, [&](int64_t first, int64_t count, Part<double>* parts) {
    const int64_t channels = order.inner;
    const bool in_place = is_dense(x, order) && x.dtype == kDtype<A>;
    std::vector<A> buffer(in_place ? 0 : count * channels), sums(3 * channels);
    std::vector<const A*> lines(count);
    for (int64_t i = 0; i < count; ++i) {
      lines[i] = read_line(x, order, first + i, buffer.data() + (in_place ? 0 : i * channels));
    }
    A *shift = sums.data(), *sum = shift + channels, *squares = sum + channels;
    measure_lines(lines.data(), count, channels, shift, sum, squares);
    for (int64_t c = 0; c < channels; ++c) {
      parts[c] = shifted_part(static_cast<double>(count), shift[c], sum[c], squares[c]);
    }
  });
}

// ---- forward of the standardised error

template <class A>
double squared_gaps(const A* s, const A* t, int64_t n, Standard<A> of_s, Standard<A> of_t) {
  constexpr int64_t kWidth = kLanesOf<A>;
  const auto centered = [](const A* x, const Standard<A>& of)
                            __attribute__((always_inline)) { return load(x) - all(of.mean) - all(of.rest); };
  Lanes<A> sums[2] = {all(A(0)), all(A(0))};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    for (int64_t k = 0; k < 2; ++k) {
      const int64_t at = i + k * kWidth;
      const Lanes<A> gap = (centered(s + at, of_s) - of_s.ratio * centered(t + at, of_t)) * all(of_s.scale);
      sums[k] += gap * gap;
    }
  }
  A sum = lane_sum<A>(sums[0] + sums[1]);
  for (; i < n; ++i) {
    const A gap = of_s.gap(s[i], t[i], of_t);
    sum += gap * gap;
  }
  return sum;
}

// Adds those of each channel; statistics as in `store_standard`.
template <class A>
void add_squared_gaps(const A* s, const A* t, int64_t channels, const A* statistics, A* sums) {
  const A* of_t = statistics + kStatistics * channels;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const A gap = standard(statistics + c, channels).gap(s[c], t[c], standard(of_t + c, channels));
    sums[c] += gap * gap;
  }
}

template <class A>
Parts<Sum> squared_gaps(const Map& s, const Map& t, const Order& order, int64_t batch, const A* statistics) {
  if (!order.by_channel) {
    const int64_t channels = order.outer;
    return channel_parts<Sum>(order, batch, [&](int64_t b, int64_t channel, int64_t first, int64_t n) {
      alignas(64) A of_s[kChunk], of_t[kChunk];
      const A *x = read(s, order, b, first, n, of_s), *y = read(t, order, b, first, n, of_t);
      return Sum{squared_gaps(x, y, n, standard(statistics + channel, channels),
                              standard(statistics + kStatistics * channels + channel, channels))};
    });
  }
  return position_parts<Sum>(order, batch, [&](int64_t first, int64_t count, Sum* parts) {
    const int64_t channels = order.inner;
    std::vector<A> memory(3 * channels);
    A *of_s = memory.data(), *of_t = of_s + channels, *sums = of_t + channels;
    for (int64_t i = first; i < first + count; ++i) {
      const A *x = read_line(s, order, i, of_s), *y = read_line(t, order, i, of_t);
      add_squared_gaps(x, y, channels, statistics, sums);
    }
    for (int64_t c = 0; c < channels; ++c) parts[c].value = sums[c];
  });
}

// ---- backward

template <class A>
void write_slopes(const A* x, int64_t n, Slope<A> slope, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = slope(x[i]);
}

// Each element with numbers of its own.
template <class A>
void write_slopes(const A* x, int64_t n, const A* mean, const A* of_mean, const A* of_variance, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = Slope<A>{mean[i], of_mean[i], of_variance[i]}(x[i]);
}

// Of one side of the standardised error; `factor` is that of the loss.
template <class A>
void write_slopes(const A* x, const A* other, int64_t n, Standard<A> of_x, Standard<A> of_other, A k, A factor,
                  A* out) {
  const A scale = factor * of_x.scale;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = scale * (of_x.gap(x[i], other[i], of_other) - k * of_x(x[i]));
}

// values [count][repeated]: those of the channels [count][channels], repeated for a chunk that begins at any of them.
template <class A>
struct Repeated {
  int64_t length;
  std::vector<A> values;

  Repeated(int64_t count, int64_t channels, bool repeat, const A* from)
      : length(channels + (repeat ? kChunk : 0)), values(count * length) {
    for (int64_t i = 0; i < count; ++i) {
      A* row = values.data() + i * length;
      std::copy_n(from + i * channels, channels, row);
      for (int64_t c = channels; c < length && channels > 0; ++c) row[c] = row[c - channels];
    }
  }
  const A* at(int64_t row, int64_t channel) const { return values.data() + row * length + channel; }
};

template <class A>
void write_slopes(const A* x, const A* other, int64_t n, const A* of_x, const A* of_other, int64_t length, A factor,
                  A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Standard<A> own = standard(of_x + i, length);
    const A gap = own.gap(x[i], other[i], standard(of_other + i, length));
    out[i] = factor * own.scale * (gap - of_x[4 * length + i] * own(x[i]));
  }
}

// f(sample, first element, n, its channel) for every chunk of the maps; channels are neighbours, or all the same.
template <class F>
void for_chunks(const Order& order, int64_t batch, const F& f) {
  const int64_t size = order.size(), pieces = (size + kPiece - 1) / kPiece;
  for_each(batch * pieces, grain_for(std::min(size, kPiece)), [&](int64_t task) {
    const int64_t b = task / pieces, begin = task % pieces * kPiece, end = std::min(begin + kPiece, size);
    for (int64_t at = begin, n; at < end; at += n) {
      n = std::min(kChunk, end - at);
      if (!order.by_channel) n = std::min(n, order.inner - at % order.inner);
      f(b, at, n, order.by_channel ? at % order.inner : at / order.inner);
    }
  });
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void moments(const Tensor& x, const Order& order, A* to) const {
    const int64_t channels = x.size(1);
    measure<A>(map(x, order), order, x.size(0)).merge([&](int64_t channel, const Part<double>& part) {
      to[channel] = static_cast<A>(part.mean);
      to[channels + channel] = static_cast<A>(part.variance());
    });
  }

  template <class A>
  void backward(const Matrix& grad, const Tensor& x, const Order& order, const Matrix& moments,
                const Tensor& out) const {
    const Map from = map(x, order);
    const int64_t batch = x.size(0), channels = x.size(1), size = order.size();
    const MapGrad to(out, true);
    const A share = A(1) / static_cast<A>(std::max<int64_t>(batch * positions(x), 1));
    std::vector<A> each(3 * channels);  // mean, of mean, of variance
    for (int64_t c = 0; c < channels; ++c) {
      each[c] = read_one<A>(moments, 0, c);
      each[channels + c] = share * read_one<A>(grad, 0, c);
      each[2 * channels + c] = 2 * share * read_one<A>(grad, 1, c);
    }
    const Repeated<A> of(3, channels, order.by_channel, each.data());
    for_chunks(order, batch, [&](int64_t b, int64_t at, int64_t n, int64_t c) {
      alignas(64) A buffer[kChunk], slopes[kChunk];
      const A* values = read(from, order, b, at, n, buffer);
      A* result = target(to, b * size + at, slopes);
      if (order.by_channel) {
        write_slopes(values, n, of.at(0, c), of.at(1, c), of.at(2, c), result);
      } else {
        write_slopes(values, n, Slope<A>{*of.at(0, c), *of.at(1, c), *of.at(2, c)}, result);
      }
      write(to, b * size + at, n, result);
    });
  }

  // statistics [2, kStatistics, channels]
  template <class A>
  void error(const Tensor& student, const Tensor& teacher, const Order& order, double epsilon, A* statistics,
             A* loss) const {
    const int64_t batch = student.size(0), channels = student.size(1), n = batch * positions(student);
    const Map s = map(student, order), t = map(teacher, order);
    for (const bool of_teacher : {false, true}) {
      measure<A>(of_teacher ? t : s, order, batch).merge([&](int64_t channel, const Part<double>& part) {
        store_standard(part, epsilon, channels, of_teacher, statistics + channel);
      });
    }
    std::vector<double> sums(channels);
    squared_gaps(s, t, order, batch, statistics).merge([&](int64_t channel, const Sum& sum) {
      sums[channel] = sum.value;
      store_slopes(static_cast<A>(sum.value / static_cast<double>(n - 1)), channels, statistics + channel);
    });
    double sum = 0;
    for (double x : sums) sum += x;
    *loss = static_cast<A>(n > 0 && channels > 0 ? sum / (2 * static_cast<double>(n) * channels) : 0);
  }

  template <class A>
  void error_backward(const Column& grad, const Tensor& student, const Tensor& teacher, const Order& order,
                      const A* statistics, const MapGrad& to_student, const MapGrad& to_teacher) const {
    const int64_t batch = student.size(0), channels = student.size(1), size = order.size();
    const Map s = map(student, order), t = map(teacher, order);
    const A factor = read<A>(grad, 0) / static_cast<A>(batch * size);
    const Repeated<A> of(2 * kStatistics, channels, order.by_channel, statistics);
    for_chunks(order, batch, [&](int64_t b, int64_t at, int64_t n, int64_t c) {
      alignas(64) A of_s[kChunk], of_t[kChunk], slopes[kChunk];
      const A *x = read(s, order, b, at, n, of_s), *y = read(t, order, b, at, n, of_t);
      const auto side = [&](const MapGrad& to, const A* own, const A* other, const A* of_own, const A* of_other) {
        if (!to.data) return;
        A* result = target(to, b * size + at, slopes);
        if (order.by_channel) {
          write_slopes(own, other, n, of_own, of_other, of.length, factor, result);
        } else {
          write_slopes(own, other, n, standard(of_own, of.length), standard(of_other, of.length), of_own[4 * of.length],
                       factor, result);
        }
        write(to, b * size + at, n, result);
      };
      side(to_student, x, y, of.at(0, c), of.at(kStatistics, c));
      side(to_teacher, y, x, of.at(kStatistics, c), of.at(0, c));
    });
  }
};

}  // namespace
}  // namespace moments
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::moments::register_ops<kdfast::moments::Cpu>(m); }
