#include <algorithm>
#include <cmath>

#include "common/lanes.h"
#include "common/map_chunk.h"
#include "common/parallel.h"
#include "common/vector_loop.h"
#include "feature/host.h"

namespace kdfast {
namespace feature {
namespace {

// Work is cut into pieces of a sample, the same whatever the number of threads; each adds up chunk by chunk.
constexpr int64_t kPiece = 64 * kChunk;

int64_t pieces_of(int64_t n) { return (n + kPiece - 1) / kPiece; }

// ---- numbers of channels

// One number per channel for elements [begin, begin + n) of a sample; null if there are none.
template <class A>
const A* broadcast(const std::vector<A>& channels, const Order& order, int64_t begin, int64_t n, A* buffer) {
  if (channels.empty()) return nullptr;
  int64_t outer = begin / order.inner, inner = begin % order.inner;
  if (order.by_channel && inner + n <= order.inner) return channels.data() + inner;
  for (int64_t done = 0, run; done < n; done += run) {
    run = std::min(order.inner - inner, n - done);
    if (order.by_channel) {
      std::copy_n(channels.data() + inner, run, buffer + done);
    } else {
      std::fill_n(buffer + done, run, channels[outer]);
    }
    ++outer;
    inner = 0;
  }
  return buffer;
}

template <class A>
std::vector<A> values_of(const Tensor& x, double factor) {
  std::vector<A> values(x.dim() == 0 ? 1 : x.size(0));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<A>(factor) * read<A>(column(x), i);
  return values;
}

// ---- loops over a chunk

template <class A, class Kind>
ErrorTerms<A> add_terms(const A* s, const A* t, const A* m, int64_t n, Kind kind) {
  const auto sums = sum_elements<Kind::kSums, A>(n, [&](int64_t i) KD_INLINED {
    const ErrorTerms<A> each = kind.terms(s[i], t[i], Kind::kPerChannel ? m[i] : A(0));
    return kdfast::Terms<A>{each.x, each.y, each.z};
  });
  return {sums.a, sums.b, sums.c};
}

template <class A, class Kind, bool kTeacher>
void write_slopes(const A* s, const A* t, const A* m, int64_t n, Kind kind, A factor, A* to_s, A* to_t) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Slopes<A> each = kind.slopes(s[i], t[i], Kind::kPerChannel ? m[i] : A(0));
    if (to_s) to_s[i] = factor * each.student;
    if (kTeacher) to_t[i] = factor * each.teacher;
  }
}

// sums[c] += (s - t)^2, for the channels of one position.
template <class A>
void add_squares(const A* s, const A* t, int64_t n, A* sums) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sums[i] += (s[i] - t[i]) * (s[i] - t[i]);
}

// ---- both maps, piece by piece

struct MapPair {
  Map student, teacher;
  Order order;  // the student's: elements are counted as they lie in its memory
  int64_t batch;

  MapPair(const Tensor& s, const Tensor& t) : order(s), batch(s.size(0)) {
    student = map(s, order);
    teacher = map(t, order);
  }
  int64_t size() const { return order.outer * order.inner; }  // of a sample

  // f(b, begin, n) for the pieces of the samples [from, to).
  template <class F>
  void for_pieces(int64_t from, int64_t to, const F& f) const {
    const int64_t pieces = pieces_of(size());
    for_each((to - from) * pieces, grain_for(std::min(size(), kPiece)), [&](int64_t task) {
      const int64_t begin = task % pieces * kPiece;
      f(from + task / pieces, begin, std::min(kPiece, size() - begin));
    });
  }

  // What `make(b)` sums over each of the samples [from, to): to sums [kSums, samples].
  template <class A, class Make>
  void sum(int64_t from, int64_t to, const std::vector<A>& channels, const Make& make, double* sums) const {
    using Kind = decltype(make(0));
    const int64_t pieces = pieces_of(size());
    std::vector<double> partial((to - from) * pieces * Kind::kSums);
    for_pieces(from, to, [&](int64_t b, int64_t begin, int64_t n) {
      alignas(64) A own[kChunk], other[kChunk], broadcasted[kChunk];
      double* total = partial.data() + ((b - from) * pieces + begin / kPiece) * Kind::kSums;
      const Kind kind = make(b);
      for (int64_t at = begin; at < begin + n; at += kChunk) {
        const int64_t width = std::min(kChunk, begin + n - at);
        const A *s = read(student, order, b, at, width, own), *t = read(teacher, order, b, at, width, other);
        const A* m = Kind::kPerChannel ? broadcast(channels, order, at, width, broadcasted) : nullptr;
        const ErrorTerms<A> terms = add_terms<A>(s, t, m, width, kind);
        total[0] += terms.x;
        if constexpr (Kind::kSums > 1) total[1] += terms.y;
        if constexpr (Kind::kSums > 2) total[2] += terms.z;
      }
    });
    for (int64_t b = from; b < to; ++b) {
      for (int k = 0; k < Kind::kSums; ++k) {
        double& sum = sums[k * batch + b] = 0;
        for (int64_t piece = 0; piece < pieces; ++piece)
          sum += partial[((b - from) * pieces + piece) * Kind::kSums + k];
      }
    }
  }

  // `factor(b)` times the slopes of `make(b)`, into the outputs that are there.
  template <class A, class Make, class Factor>
  void slopes(const std::vector<A>& channels, const Make& make, const Factor& factor, const MapGrad& to_s,
              const MapGrad& to_t) const {
    using Kind = decltype(make(0));
    for_pieces(0, batch, [&](int64_t b, int64_t begin, int64_t n) {
      alignas(64) A own[kChunk], other[kChunk], broadcasted[kChunk], own_slopes[kChunk], other_slopes[kChunk];
      const Kind kind = make(b);
      for (int64_t at = begin; at < begin + n; at += kChunk) {
        const int64_t width = std::min(kChunk, begin + n - at), out = b * size() + at;
        const A *s = read(student, order, b, at, width, own), *t = read(teacher, order, b, at, width, other);
        const A* m = Kind::kPerChannel ? broadcast(channels, order, at, width, broadcasted) : nullptr;
        A* slope_s = target(to_s, out, own_slopes);
        if (to_t.data) {
          A* slope_t = target(to_t, out, other_slopes);
          write_slopes<A, Kind, true>(s, t, m, width, kind, factor(b), slope_s, slope_t);
          write(to_t, out, width, slope_t);
        } else {
          write_slopes<A, Kind, false>(s, t, m, width, kind, factor(b), slope_s, nullptr);
        }
        write(to_s, out, width, slope_s);
      }
    });
  }
};

// ---- one sum per channel

// -> the sum of (s - t)^2 over the samples and positions of each channel.
template <class A>
std::vector<double> channel_squares(const MapPair& maps) {
  const Order& order = maps.order;
  const int64_t channels = order.by_channel ? order.inner : order.outer;
  constexpr int64_t kRows = 64;  // of a task: positions with all their channels, or channels with all their positions
  const int64_t blocks = (order.outer + kRows - 1) / kRows;
  // By channel: sums of each task. Else each row is one channel of a sample.
  std::vector<double> partial((order.by_channel ? maps.batch * blocks : maps.batch) * channels);
  for_each(maps.batch * blocks, grain_for(kRows * order.inner), [&](int64_t task) {
    alignas(64) A own[kChunk], other[kChunk];
    const int64_t b = task / blocks, first = task % blocks * kRows, end = std::min(first + kRows, order.outer);
    const auto chunks = [&](int64_t row, const auto& f) {
      for (int64_t i = 0; i < order.inner; i += kChunk) {
        const int64_t width = std::min(kChunk, order.inner - i), at = row * order.inner + i;
        f(read(maps.student, order, b, at, width, own), read(maps.teacher, order, b, at, width, other), i, width);
      }
    };
    if (order.by_channel) {
      std::vector<A> sums(channels);
      for (int64_t row = first; row < end; ++row) {
        chunks(row, [&](const A* s, const A* t, int64_t i, int64_t n) { add_squares(s, t, n, sums.data() + i); });
      }
      std::copy(sums.begin(), sums.end(), partial.begin() + task * channels);
    } else {
      for (int64_t row = first; row < end; ++row) {
        double& sum = partial[b * channels + row];
        chunks(row, [&](const A* s, const A* t, int64_t, int64_t n) {
          sum += add_terms<A>(s, t, nullptr, n, PlainSquare<A>{}).x;
        });
      }
    }
  });
  std::vector<double> sums(channels);
  for (size_t at = 0; at < partial.size(); at += channels) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += partial[at + c];
  }
  return sums;
}

// ---- the pyramid

// The first n elements, zeros after them. n may be more than a vector.
template <class A>
KD_HD Lanes<A> load_some(const A* from, int64_t n) {
  if (n >= kLanesOf<A>) return load(from);
  alignas(64) A lanes[kLanesOf<A>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = from[i];
  return load(lanes);
}

template <class A>
KD_HD void store_some(A* to, const Lanes<A>& v, int64_t n) {
  if (n >= kLanesOf<A>) return store(to, v);
  for (int64_t i = 0; i < n; ++i) to[i] = v[i];
}

// The first n lanes of v, zeros after them.
template <class A>
KD_HD Lanes<A> first_lanes(const Lanes<A>& v, int64_t n) {
  alignas(64) A lanes[kLanesOf<A>];
  store(lanes, v);
  for (int64_t i = 0; i < kLanesOf<A>; ++i) lanes[i] = i < n ? lanes[i] : A(0);
  return load(lanes);
}

// Sums of s - t in each cell of a plane, rows without gaps: to cells[.][lane]. -> the sum of (s - t)^2.
template <class A>
double sum_plane(const A* s, const A* t, const Pyramid& p, A* line, Lanes<A>* cells, int64_t lane) {
  constexpr int64_t L = kLanesOf<A>;
  const int64_t size = p.height * p.width;
  double squares = 0;
  for (int segment = 0; segment < p.rows.segments; ++segment) {
    const int64_t top = p.rows.begin[segment];
    Lanes<A> sum{};
    for (int64_t y = top; y < p.rows.begin[segment + 1]; ++y) {
      // The last vector of a row reaches into the next one: its sums are not read.
      for (int64_t x = 0; x < p.width; x += L) {
        const int64_t at = y * p.width + x, left = size - at;
        Lanes<A> d = load_some(s + at, left) - load_some(t + at, left);
        store(line + x, y == top ? d : load(line + x) + d);
        if (x + L > p.width) d = first_lanes<A>(d, p.width - x);
        sum += d * d;
      }
    }
    squares += lane_sum<A>(sum);
    for (int column = 0; column < p.columns.segments; ++column) {
      A total = 0;
      for (int64_t x = p.columns.begin[column]; x < p.columns.begin[column + 1]; ++x) total += line[x];
      cells[segment * p.columns.segments + column][lane] = total;
    }
  }
  return squares;
}

// Gradients of a plane, `factor` times (own (s - t) + its cell's slope); negative in the teacher. Either may be absent.
template <class A>
void write_plane(const A* s, const A* t, const Pyramid& p, A* line, const Lanes<A>* cells, int64_t lane, A own,
                 A factor, A* to_s, A* to_t) {
  constexpr int64_t L = kLanesOf<A>;
  const int64_t size = p.height * p.width;
  const Lanes<A> own_lanes = all(own), factor_lanes = all(factor);
  for (int segment = 0; segment < p.rows.segments; ++segment) {
    for (int column = 0; column < p.columns.segments; ++column) {
      const A slope = cells[segment * p.columns.segments + column][lane];
      for (int64_t x = p.columns.begin[column]; x < p.columns.begin[column + 1]; ++x) line[x] = slope;
    }
    for (int64_t y = p.rows.begin[segment]; y < p.rows.begin[segment + 1]; ++y) {
      // What the last vector of a row writes of the next one is written once more.
      for (int64_t x = 0; x < p.width; x += L) {
        const int64_t at = y * p.width + x, left = size - at;
        const Lanes<A> d = load_some(s + at, left) - load_some(t + at, left);
        const Lanes<A> slope = factor_lanes * (own_lanes * d + load(line + x));
        if (to_s) store_some<A>(to_s + at, slope, left);
        if (to_t) store_some<A>(to_t + at, -slope, left);
      }
    }
  }
}

// A line of positions, each with n channels side by side, `step` elements from one position to the next.
template <class A>
struct Line {
  A* data;
  int64_t step;
};

// Sums of s - t in each cell of a row of cells [columns, vectors], for n channels of a line. -> the sum of (s - t)^2.
template <class A>
double sum_line(Line<const A> s, Line<const A> t, const Axis& columns, int64_t n, Lanes<A>* cells) {
  constexpr int64_t L = kLanesOf<A>;
  const int64_t vectors = (n + L - 1) / L;
  Lanes<A> sum{};
  for (int column = 0; column < columns.segments; ++column) {
    for (int64_t x = columns.begin[column]; x < columns.begin[column + 1]; ++x) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = v * L;
        const Lanes<A> d = load_some(s.data + x * s.step + at, n - at) - load_some(t.data + x * t.step + at, n - at);
        cells[column * vectors + v] += d;
        sum += d * d;
      }
    }
  }
  return lane_sum<A>(sum);
}

template <class A>
void write_line(Line<const A> s, Line<const A> t, const Axis& columns, int64_t n, const Lanes<A>* cells, A own,
                A factor, Line<A> to_s, Line<A> to_t) {
  constexpr int64_t L = kLanesOf<A>;
  const int64_t vectors = (n + L - 1) / L;
  const Lanes<A> own_lanes = all(own), factor_lanes = all(factor);
  for (int column = 0; column < columns.segments; ++column) {
    for (int64_t x = columns.begin[column]; x < columns.begin[column + 1]; ++x) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = v * L;
        const Lanes<A> d = load_some(s.data + x * s.step + at, n - at) - load_some(t.data + x * t.step + at, n - at);
        const Lanes<A> slope = factor_lanes * (own_lanes * d + cells[column * vectors + v]);
        if (to_s.data) store_some<A>(to_s.data + x * to_s.step + at, slope, n - at);
        if (to_t.data) store_some<A>(to_t.data + x * to_t.step + at, -slope, n - at);
      }
    }
  }
}

// The averages of as many channels as `vectors` have lanes, see `pool`. cells [cells, vectors].
template <bool kGradient, class A>
A pool_lanes(const Pyramid& p, Lanes<A>* cells, int64_t vectors) {
  Lanes<A> loss{};
  for (int64_t v = 0; v < vectors; ++v) loss += pool<kGradient, Lanes<A>, A>(p, cells + v, vectors);
  return lane_sum<A>(loss);
}

// A map (B, C, H, W) of any type and strides.
struct Source {
  const void* data;
  ScalarType dtype;
  int64_t sample, channel, row, column;

  explicit Source(const Tensor& x)
      : data(x.data_ptr()),
        dtype(x.scalar_type()),
        sample(x.stride(0)),
        channel(x.stride(1)),
        row(x.stride(2)),
        column(x.stride(3)) {}
};

struct PyramidMaps {
  Source student, teacher;
  int64_t batch, channels, height, width;
  Pyramid pyramid;

  PyramidMaps(const Tensor& s, const Tensor& t)
      : student(s),
        teacher(t),
        batch(s.size(0)),
        channels(s.size(1)),
        height(s.size(2)),
        width(s.size(3)),
        pyramid(batch * channels, height, width) {}
};

// Maps read channel after channel. A task is a few channels of a sample, one to a lane: as many as a cache holds, for
// the gradient reads them twice.
template <class A>
struct Planes : PyramidMaps {
  static constexpr int64_t kMaxVectors = 1;
  int64_t size, block, blocks;

  Planes(const Tensor& s, const Tensor& t) : PyramidMaps(s, t), size(height * width) {
    block = std::clamp<int64_t>(kMapGrain / size, 1, kLanesOf<A>);
    blocks = (channels + block - 1) / block;
  }
  int64_t elements() const { return block * size; }  // of a task
  int64_t vectors(int64_t) const { return 1; }

  // f(sample, channel, its lane) for the channels of a task.
  template <class F>
  void for_channels(int64_t task, const F& f) const {
    const int64_t first = task % blocks * block, end = std::min(first + block, channels);
    for (int64_t c = first; c < end; ++c) f(task / blocks, c, c - first);
  }

  // A plane without gaps: in place where that is possible, else copied.
  const A* plane(const Source& x, int64_t b, int64_t c, std::vector<A>& buffer) const {
    const int64_t at = b * x.sample + c * x.channel;
    const bool dense = (x.column == 1 || width == 1) && (x.row == width || height == 1);
    if (dense && x.dtype == kDtype<A>) return static_cast<const A*>(x.data) + at;
    buffer.resize(size);
    dispatch_float(x.dtype, [&](auto tag) {
      const auto* from = static_cast<const decltype(tag)*>(x.data) + at;
      if (dense) return widen(from, 1, size, buffer.data());
      for (int64_t y = 0; y < height; ++y) widen(from + y * x.row, x.column, width, buffer.data() + y * width);
    });
    return buffer.data();
  }

  double sum(int64_t task, Lanes<A>* cells) const {
    std::vector<A> own, other, line(width + kLanes);
    double squares = 0;
    for_channels(task, [&](int64_t b, int64_t c, int64_t lane) {
      squares += sum_plane(plane(student, b, c, own), plane(teacher, b, c, other), pyramid, line.data(), cells, lane);
    });
    return squares;
  }

  void write(int64_t task, const Lanes<A>* slopes, A factor, const MapGrad& to_s, const MapGrad& to_t) const {
    std::vector<A> own, other, line(width + kLanes), grad_s(to_s.copied<A>() * size), grad_t(to_t.copied<A>() * size);
    for_channels(task, [&](int64_t b, int64_t c, int64_t lane) {
      const int64_t at = (b * channels + c) * size;
      A *s = target(to_s, at, grad_s.data()), *t = target(to_t, at, grad_t.data());
      write_plane(plane(student, b, c, own), plane(teacher, b, c, other), pyramid, line.data(), slopes, lane,
                  static_cast<A>(2 * pyramid.own), factor, s, t);
      kdfast::write(to_s, at, size, s);
      kdfast::write(to_t, at, size, t);
    });
  }
};

// Maps read position after position (channels_last). A task is up to kBlock channels of a sample.
template <class A>
struct Positions : PyramidMaps {
  static constexpr int64_t kBlock = 128, kMaxVectors = kBlock / kLanesOf<A>;
  int64_t blocks;

  Positions(const Tensor& s, const Tensor& t) : PyramidMaps(s, t), blocks((channels + kBlock - 1) / kBlock) {}
  int64_t elements() const { return kBlock * height * width; }
  int64_t first(int64_t task) const { return task % blocks * kBlock; }
  int64_t length(int64_t task) const { return std::min(kBlock, channels - first(task)); }
  int64_t vectors(int64_t task) const { return (length(task) + kLanesOf<A> - 1) / kLanesOf<A>; }

  Line<const A> line(const Source& x, int64_t task, int64_t y, std::vector<A>& buffer) const {
    const int64_t at = task / blocks * x.sample + first(task) * x.channel + y * x.row, n = length(task);
    if (x.dtype == kDtype<A> && (x.channel == 1 || n == 1)) return {static_cast<const A*>(x.data) + at, x.column};
    buffer.resize(width * n);
    dispatch_float(x.dtype, [&](auto tag) {
      const auto* from = static_cast<const decltype(tag)*>(x.data) + at;
      for (int64_t i = 0; i < width; ++i) widen(from + i * x.column, x.channel, n, buffer.data() + i * n);
    });
    return {buffer.data(), n};
  }

  // f(student's line, teacher's, its number, its row of cells) for the lines of a task.
  template <class F>
  void for_lines(int64_t task, const F& f) const {
    std::vector<A> own, other;
    for (int segment = 0; segment < pyramid.rows.segments; ++segment) {
      const int64_t cells = segment * pyramid.columns.segments * vectors(task);
      for (int64_t y = pyramid.rows.begin[segment]; y < pyramid.rows.begin[segment + 1]; ++y) {
        f(line(student, task, y, own), line(teacher, task, y, other), y, cells);
      }
    }
  }

  double sum(int64_t task, Lanes<A>* cells) const {
    double squares = 0;
    for_lines(task, [&](Line<const A> s, Line<const A> t, int64_t, int64_t row) {
      squares += sum_line(s, t, pyramid.columns, length(task), cells + row);
    });
    return squares;
  }

  void write(int64_t task, const Lanes<A>* slopes, A factor, const MapGrad& to_s, const MapGrad& to_t) const {
    const int64_t n = length(task);
    std::vector<A> grad_s(to_s.copied<A>() * width * n), grad_t(to_t.copied<A>() * width * n);
    for_lines(task, [&](Line<const A> s, Line<const A> t, int64_t y, int64_t row) {
      const int64_t at = ((task / blocks * height + y) * width) * channels + first(task);
      const auto line_of = [&](const MapGrad& to, std::vector<A>& buffer) {
        return Line<A>{target(to, at, buffer.data()), buffer.empty() ? channels : n};
      };
      const Line<A> out_s = line_of(to_s, grad_s), out_t = line_of(to_t, grad_t);
      write_line(s, t, pyramid.columns, n, slopes + row, static_cast<A>(2 * pyramid.own), factor, out_s, out_t);
      for (int64_t x = 0; x < width; ++x) {
        if (!grad_s.empty()) kdfast::write(to_s, at + x * channels, n, out_s.data + x * out_s.step);
        if (!grad_t.empty()) kdfast::write(to_t, at + x * channels, n, out_t.data + x * out_t.step);
      }
    });
  }
};

// f(maps) in the order in which they are read.
template <class A, class F>
void dispatch_order(const Tensor& student, const Tensor& teacher, const F& f) {
  if (Order(student).by_channel) {
    f(Positions<A>(student, teacher));
  } else {
    f(Planes<A>(student, teacher));
  }
}

// f(make) with `make(b)` the terms of sample b.
template <class A, class F>
void dispatch_kind(int64_t kind, double boundary, bool per_channel, const F& f) {
  if (kind == kBoundary) {
    f([&](int64_t) { return Boundary<A>{static_cast<A>(boundary)}; });
  } else if (kind == kPartial) {
    f([](int64_t) { return Partial<A>{}; });
  } else if (per_channel) {
    f([](int64_t) { return Square<A>{}; });
  } else {
    f([](int64_t) { return PlainSquare<A>{}; });
  }
}

// f(make) with `make(norms and dots...)` the normalized terms.
template <class A, class F>
void dispatch_power(int64_t power, const F& f) {
  if (power == 1) {
    f([](auto... stats) { return Normalized<A, 1>(stats...); });
  } else {
    f([](auto... stats) { return Normalized<A, 2>(stats...); });
  }
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void error(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& margin,
             const ErrorSettings& settings, A* out) const {
    const int64_t batch = student.size(0);
    const MapPair maps(student, teacher);
    const auto put = [&](const std::vector<double>& sums) {
      for (double sum : sums) *out++ = static_cast<A>(settings.scale * sum);
    };
    if (settings.over == kChannel) return put(channel_squares<A>(maps));
    std::vector<double> sums(batch);
    const std::vector<A> channels = margin ? values_of<A>(*margin, 1) : std::vector<A>();
    dispatch_kind<A>(settings.kind, settings.boundary, false,
                     [&](const auto& make) { maps.sum(0, batch, channels, make, sums.data()); });
    if (settings.over == kSample) return put(sums);
    double total = 0;
    for (double sum : sums) total += sum;
    put({total});
  }

  template <class A>
  void error_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                      const std::optional<Tensor>& margin, const ErrorSettings& settings, const MapGrads& grads) const {
    const bool per_channel = settings.over == kChannel, per_sample = settings.over == kSample;
    const MapPair maps(student, teacher);
    const std::vector<A> factors = values_of<A>(grad, settings.scale);
    // Per channel it is the upstream gradient that the terms take, else the margin.
    const std::vector<A> channels = per_channel ? factors : margin ? values_of<A>(*margin, 1) : std::vector<A>();
    const auto factor = [&](int64_t b) { return per_channel ? A(1) : factors[per_sample ? b : 0]; };
    dispatch_kind<A>(settings.kind, settings.boundary, per_channel, [&](const auto& make) {
      maps.slopes(channels, make, factor, grads.to_student, grads.to_teacher);
    });
  }

  template <class A>
  void normalized(const Tensor& student, const Tensor& teacher, int64_t power, A* to, A* loss) const {
    const int64_t batch = student.size(0);
    const MapPair maps(student, teacher);
    std::vector<double> norms(2 * batch), sums(3 * batch);
    // A few samples at a time, which are still in a cache when they are read again.
    const int64_t group = std::max<int64_t>(1, (int64_t(1) << 18) / std::max<int64_t>(maps.size(), 1));
    for (int64_t from = 0; from < batch; from += group) {
      const int64_t end = std::min(from + group, batch);
      maps.sum<A>(from, end, {}, [](int64_t) { return Lengths<A>{}; }, norms.data());
      for (int64_t b = from; b < end; ++b) {
        to[b] = static_cast<A>(std::sqrt(norms[b]));
        to[batch + b] = static_cast<A>(std::sqrt(norms[batch + b]));
      }
      dispatch_power<A>(power, [&](const auto& make) {
        maps.sum<A>(from, end, {}, [&](int64_t b) { return make(to[b], to[batch + b]); }, sums.data());
      });
    }
    double total = 0;
    for (int64_t b = 0; b < batch; ++b) {
      total += sums[b];
      to[2 * batch + b] = static_cast<A>(sums[batch + b]);
      to[3 * batch + b] = static_cast<A>(sums[2 * batch + b]);
    }
    *loss = static_cast<A>(total / std::max<double>(1, double(batch) * maps.size()));
  }

  template <class A>
  void normalized_backward(const Column& grad, const Tensor& student, const Tensor& teacher, const A* x, int64_t power,
                           const MapGrads& grads) const {
    const MapPair maps(student, teacher);
    const int64_t n = maps.batch;
    const double elements = std::max<double>(1, double(n) * maps.size());
    const A factor = static_cast<A>(read<A>(grad, 0) / elements);
    dispatch_power<A>(power, [&](const auto& make) {
      maps.slopes(
          std::vector<A>(), [&](int64_t b) { return make(x[b], x[n + b], x[2 * n + b], x[3 * n + b]); },
          [&](int64_t) { return factor; }, grads.to_student, grads.to_teacher);
    });
  }

  template <class A>
  void pyramid(const Tensor& student, const Tensor& teacher, A* loss) const {
    double total = 0;
    dispatch_order<A>(student, teacher, [&](const auto& maps) {
      std::vector<double> losses(maps.batch * maps.blocks);
      for_each(losses.size(), grain_for(maps.elements()), [&](int64_t task) {
        Lanes<A> cells[kMaxCells * std::decay_t<decltype(maps)>::kMaxVectors];
        const int64_t vectors = maps.vectors(task);
        std::fill_n(cells, maps.pyramid.cells() * vectors, Lanes<A>{});
        const double squares = maps.sum(task, cells);
        losses[task] = maps.pyramid.own * squares + pool_lanes<false, A>(maps.pyramid, cells, vectors);
      });
      for (double loss : losses) total += loss;
    });
    *loss = static_cast<A>(total);
  }

  template <class A>
  void pyramid_backward(const Column& grad, const Tensor& student, const Tensor& teacher, const MapGrads& grads) const {
    const A factor = read<A>(grad, 0);
    dispatch_order<A>(student, teacher, [&](const auto& maps) {
      for_each(maps.batch * maps.blocks, grain_for(maps.elements()), [&](int64_t task) {
        Lanes<A> cells[kMaxCells * std::decay_t<decltype(maps)>::kMaxVectors];
        const int64_t vectors = maps.vectors(task);
        std::fill_n(cells, maps.pyramid.cells() * vectors, Lanes<A>{});
        maps.sum(task, cells);
        pool_lanes<true, A>(maps.pyramid, cells, vectors);
        maps.write(task, cells, factor, grads.to_student, grads.to_teacher);
      });
    });
  }
};

}  // namespace
}  // namespace feature
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::feature::register_ops<kdfast::feature::Cpu>(m); }
