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
struct Parts {
  int64_t channels;
  std::vector<Part<double>> parts;

  Parts(int64_t pieces, int64_t channels) : channels(channels), parts(pieces * channels) {}
  Part<double>& at(int64_t piece, int64_t channel) { return parts[piece * channels + channel]; }
};

// Channel after channel: a piece is of one channel of a sample.
template <class A>
Parts measure_channels(const Map& x, const Order& order, int64_t batch) {
  const int64_t channels = order.outer, pieces = (order.inner + kPiece - 1) / kPiece;
  Parts parts(batch * pieces, channels);
  for_each(batch * pieces * channels, grain_for(std::min(order.inner, kPiece)), [&](int64_t task) {
    alignas(64) A buffer[kChunk];
    const int64_t channel = task % channels, piece = task / channels;
    const int64_t first = channel * order.inner, begin = piece % pieces * kPiece;
    const int64_t end = std::min(begin + kPiece, order.inner);
    Part<double>& part = parts.at(piece, channel);
    for (int64_t at = begin; at < end; at += kChunk) {
      const int64_t n = std::min(kChunk, end - at);
      part.add(measure(read(x, order, piece / pieces, first + at, n, buffer), n));
    }
  });
  return parts;
}

// Position after position: a piece is some positions, of one sample or several, with all their channels.
template <class A>
Parts measure_positions(const Map& x, const Order& order, int64_t batch) {
  const int64_t channels = order.inner, positions = batch * order.outer;
  const int64_t of_piece = std::clamp(kBlock / std::max<int64_t>(channels, 1), kMinPositions, kMaxPositions);
  const int64_t pieces = (positions + of_piece - 1) / of_piece;
  Parts parts(pieces, channels);
  for_each(pieces, grain_for(of_piece * channels), [&](int64_t piece) {
    const int64_t first = piece * of_piece, count = std::min(of_piece, positions - first);
    const bool in_place = is_dense(x, order) && x.dtype == kDtype<A>;
    std::vector<A> buffer(in_place ? 0 : count * channels), sums(3 * channels);
    std::vector<const A*> lines(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = (first + i) / order.outer, position = (first + i) % order.outer;
      lines[i] = read(x, order, b, position * channels, channels, buffer.data() + (in_place ? 0 : i * channels));
    }
    A *shift = sums.data(), *sum = shift + channels, *squares = sum + channels;
    measure_lines(lines.data(), count, channels, shift, sum, squares);
    for (int64_t c = 0; c < channels; ++c) {
      parts.at(piece, c) = shifted_part(static_cast<double>(count), shift[c], sum[c], squares[c]);
    }
  });
  return parts;
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

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void moments(const Tensor& x, const Order& order, A* to) const {
    const int64_t batch = x.size(0), channels = x.size(1);
    const Map from = map(x, order);
    Parts parts = order.by_channel ? measure_positions<A>(from, order, batch) : measure_channels<A>(from, order, batch);
    const int64_t pieces = static_cast<int64_t>(parts.parts.size()) / channels;
    constexpr int64_t kTile = 32;  // channels, whose parts are neighbours
    for_each((channels + kTile - 1) / kTile, grain_for(kTile * pieces), [&](int64_t task) {
      Part<double> sums[kTile] = {};
      const int64_t first = task * kTile, n = std::min(kTile, channels - first);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t c = 0; c < n; ++c) sums[c].add(parts.at(piece, first + c));
      }
      for (int64_t c = 0; c < n; ++c) {
        to[first + c] = static_cast<A>(sums[c].mean);
        to[channels + first + c] = static_cast<A>(sums[c].variance());
      }
    });
  }

  template <class A>
  void backward(const Matrix& grad, const Tensor& x, const Order& order, const Matrix& moments,
                const Tensor& out) const {
    const Map from = map(x, order);
    const int64_t batch = x.size(0), channels = x.size(1), size = order.size();
    const MapGrad to(out, true);
    const A share = A(1) / static_cast<A>(std::max<int64_t>(batch * positions(x), 1));
    // Repeated for a chunk that begins at any channel, where channels are neighbours.
    const int64_t repeated = channels + (order.by_channel ? kChunk : 0);
    std::vector<A> mean(repeated), of_mean(repeated), of_variance(repeated);
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = read_one<A>(moments, 0, c);
      of_mean[c] = share * read_one<A>(grad, 0, c);
      of_variance[c] = 2 * share * read_one<A>(grad, 1, c);
    }
    for (std::vector<A>* values : {&mean, &of_mean, &of_variance}) {
      for (int64_t c = channels; c < repeated && channels > 0; ++c) (*values)[c] = (*values)[c - channels];
    }
    const int64_t pieces = (size + kPiece - 1) / kPiece;
    for_each(batch * pieces, grain_for(std::min(size, kPiece)), [&](int64_t task) {
      alignas(64) A buffer[kChunk], slopes[kChunk];
      const int64_t b = task / pieces, begin = task % pieces * kPiece, end = std::min(begin + kPiece, size);
      for (int64_t at = begin, n; at < end; at += n) {
        const int64_t c = order.by_channel ? at % order.inner : at / order.inner;
        n = std::min(kChunk, end - at);
        if (!order.by_channel) n = std::min(n, order.inner - at % order.inner);
        const A* values = read(from, order, b, at, n, buffer);
        A* result = target(to, b * size + at, slopes);
        if (order.by_channel) {
          write_slopes(values, n, &mean[c], &of_mean[c], &of_variance[c], result);
        } else {
          write_slopes(values, n, Slope<A>{mean[c], of_mean[c], of_variance[c]}, result);
        }
        write(to, b * size + at, n, result);
      }
    });
  }
};

}  // namespace
}  // namespace moments
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::moments::register_ops<kdfast::moments::Cpu>(m); }
