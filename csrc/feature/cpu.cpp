#include <algorithm>
#include <cmath>

#include "common/map_chunk.h"
#include "common/parallel.h"
#include "feature/math.h"

namespace kdfast {
namespace feature {
namespace {

// Work is cut into pieces of a sample, the same whatever the number of threads; each adds up chunk by chunk.
constexpr int64_t kPiece = 64 * kChunk;

int64_t pieces_of(int64_t n) { return (n + kPiece - 1) / kPiece; }

// ---- numbers of channels

// One number per channel for elements [begin, begin + n) of a sample; null if there are none.
template <class A>
const A* spread(const std::vector<A>& channels, const Order& order, int64_t begin, int64_t n, A* buffer) {
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
KD_MULTIVERSION Terms<A> add_terms(const A* s, const A* t, const A* m, int64_t n, Kind kind) {
  // A sum for each lane by hand: GCC 12 leaves a simd reduction of three sums scalar.
  alignas(64) A x[kLanes] = {}, y[kLanes] = {}, z[kLanes] = {};
  const auto add = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    const Terms<A> each = kind.terms(s[i], t[i], Kind::kPerChannel ? m[i] : A(0));
    x[lane] += each.x;
    if (Kind::kSums > 1) y[lane] += each.y;
    if (Kind::kSums > 2) z[lane] += each.z;
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int64_t i = whole; i < n; ++i) add(i, i - whole);
  Terms<A> sums{0, 0, 0};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sums.x += x[lane];
    sums.y += y[lane];
    sums.z += z[lane];
  }
  return sums;
}

template <class A, class Kind, bool kTeacher>
KD_MULTIVERSION void write_slopes(const A* s, const A* t, const A* m, int64_t n, Kind kind, A factor, A* to_s,
                                  A* to_t) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Slopes<A> each = kind.slopes(s[i], t[i], Kind::kPerChannel ? m[i] : A(0));
    if (to_s) to_s[i] = factor * each.student;
    if (kTeacher) to_t[i] = factor * each.teacher;
  }
}

// sums[c] += (s - t)^2, for the channels of one position.
template <class A>
KD_MULTIVERSION void add_squares(const A* s, const A* t, int64_t n, A* sums) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sums[i] += (s[i] - t[i]) * (s[i] - t[i]);
}

// ---- both maps, piece by piece

struct Pair {
  Map student, teacher;
  Order order;  // the student's: elements are counted as they lie in its memory
  int64_t batch;

  Pair(const Tensor& s, const Tensor& t) : order(s), batch(s.size(0)) {
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
      alignas(64) A own[kChunk], other[kChunk], spreaded[kChunk];
      double* total = partial.data() + ((b - from) * pieces + begin / kPiece) * Kind::kSums;
      const Kind kind = make(b);
      for (int64_t at = begin; at < begin + n; at += kChunk) {
        const int64_t width = std::min(kChunk, begin + n - at);
        const A *s = read(student, order, b, at, width, own), *t = read(teacher, order, b, at, width, other);
        const A* m = Kind::kPerChannel ? spread(channels, order, at, width, spreaded) : nullptr;
        const Terms<A> terms = add_terms<A>(s, t, m, width, kind);
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
  void slopes(const std::vector<A>& channels, const Make& make, const Factor& factor, const Output& to_s,
              const Output& to_t) const {
    using Kind = decltype(make(0));
    for_pieces(0, batch, [&](int64_t b, int64_t begin, int64_t n) {
      alignas(64) A own[kChunk], other[kChunk], spreaded[kChunk], own_slopes[kChunk], other_slopes[kChunk];
      const Kind kind = make(b);
      for (int64_t at = begin; at < begin + n; at += kChunk) {
        const int64_t width = std::min(kChunk, begin + n - at), out = b * size() + at;
        const A *s = read(student, order, b, at, width, own), *t = read(teacher, order, b, at, width, other);
        const A* m = Kind::kPerChannel ? spread(channels, order, at, width, spreaded) : nullptr;
        A* slope_s = to_s.data ? target(to_s, out, own_slopes) : nullptr;
        if (to_t.data) {
          A* slope_t = target(to_t, out, other_slopes);
          write_slopes<A, Kind, true>(s, t, m, width, kind, factor(b), slope_s, slope_t);
          write(to_t, out, width, slope_t);
        } else {
          write_slopes<A, Kind, false>(s, t, m, width, kind, factor(b), slope_s, nullptr);
        }
        if (to_s.data) write(to_s, out, width, slope_s);
      }
    });
  }
};

// ---- one sum per channel

// -> the sum of (s - t)^2 over the samples and positions of each channel.
template <class A>
std::vector<double> channel_squares(const Pair& maps) {
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

// sums += s - t, -> the sum of (s - t)^2.
template <class A>
KD_MULTIVERSION A add_differences(const A* s, const A* t, int64_t n, A* sums) {
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    const A d = s[i] - t[i];
    sums[i] += d;
    squares += d * d;
  }
  return squares;
}

template <class A>
KD_MULTIVERSION void write_line(const A* s, const A* t, const A* slopes, int64_t n, A own, A factor, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = factor * (own * (s[i] - t[i]) + slopes[i]);
}

struct Strides {
  int64_t sample, channel, row, column;
};

inline Strides strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

// Maps are read line by line: a row of one channel, or (channels_last) kBlock channels of a position.
template <class A>
struct PyramidMaps {
  static constexpr int64_t kBlock = 128;
  const Tensor &student, &teacher;
  int64_t batch, channels, height, width;
  bool by_channel;
  Pyramid pyramid;
  std::vector<int> row_segment, column_segment;

  PyramidMaps(const Tensor& s, const Tensor& t)
      : student(s),
        teacher(t),
        batch(s.size(0)),
        channels(s.size(1)),
        height(s.size(2)),
        width(s.size(3)),
        by_channel(Order(s).by_channel),
        pyramid(batch * channels, height, width),
        row_segment(segments(pyramid.rows)),
        column_segment(segments(pyramid.columns)) {}

  static std::vector<int> segments(const Axis& axis) {
    std::vector<int> result;
    for (int i = 0; i < axis.segments; ++i) result.resize(axis.begin[i + 1], i);
    return result;
  }

  int64_t across() const { return pyramid.columns.segments; }
  int64_t blocks() const { return by_channel ? (channels + kBlock - 1) / kBlock : channels; }
  int64_t tasks() const { return batch * blocks(); }

  static const A* line(const Tensor& x, int64_t at, int64_t stride, int64_t n, std::vector<A>& buffer) {
    if (x.scalar_type() == kDtype<A> && (stride == 1 || n == 1)) return static_cast<const A*>(x.data_ptr()) + at;
    buffer.resize(n);
    dispatch_float(x.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      widen(static_cast<const T*>(x.data_ptr()) + at, stride, n, buffer.data());
    });
    return buffer.data();
  }

  // f(student's line, teacher's, its length, which line of sums it adds to, where it begins in a dense output).
  template <class F>
  void for_lines(int64_t task, const F& f) const {
    const int64_t b = task / blocks(), c = task % blocks() * (by_channel ? kBlock : 1);
    const int64_t length = by_channel ? std::min(kBlock, channels - c) : width;
    const Strides s = strides(student), t = strides(teacher);
    const auto at = [&](const Strides& x, int64_t y, int64_t column) {
      return b * x.sample + c * x.channel + y * x.row + column * x.column;
    };
    std::vector<A> own, other;
    for (int64_t y = 0; y < height; ++y) {
      for (int64_t x = 0; x < (by_channel ? width : 1); ++x) {
        const A* student_line = line(student, at(s, y, x), by_channel ? s.channel : s.column, length, own);
        const A* teacher_line = line(teacher, at(t, y, x), by_channel ? t.channel : t.column, length, other);
        const int64_t segment = by_channel ? row_segment[y] * across() + column_segment[x] : row_segment[y];
        const int64_t out =
            by_channel ? ((b * height + y) * width + x) * channels + c : ((b * channels + c) * height + y) * width;
        f(student_line, teacher_line, length, segment, out);
      }
    }
  }

  // -> the loss of a task; with kGradient `lines` are the slopes that the averages give to each line of a segment.
  template <bool kGradient>
  double pooled(int64_t task, std::vector<A>& lines) const {
    const int64_t length = by_channel ? std::min(kBlock, channels - task % blocks() * kBlock) : width;
    lines.assign((by_channel ? pyramid.cells() : pyramid.rows.segments) * length, A(0));
    double squares = 0, loss = 0;
    for_lines(task, [&](const A* s, const A* t, int64_t n, int64_t segment, int64_t) {
      squares += add_differences(s, t, n, lines.data() + segment * n);
    });
    if (by_channel) {
      for (int64_t i = 0; i < length; ++i) loss += pool<kGradient>(pyramid, lines.data() + i, length);
    } else {
      A cells[kMostCells] = {};
      for_cells([&](int64_t cell, int64_t at) { cells[cell] += lines[at]; });
      loss = pool<kGradient>(pyramid, cells, 1);
      if (kGradient) for_cells([&](int64_t cell, int64_t at) { lines[at] = cells[cell]; });
    }
    return pyramid.own * squares + loss;
  }

  // f(cell, element of the lines) of a map that is read by rows.
  template <class F>
  void for_cells(const F& f) const {
    for (int64_t y = 0; y < pyramid.rows.segments; ++y) {
      for (int64_t x = 0; x < width; ++x) f(y * across() + column_segment[x], y * width + x);
    }
  }

  int64_t grain() const { return grain_for(height * width * (by_channel ? kBlock : 1)); }
};

// ---- the ops

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

Tensor feature_error_cpu(Tensor student, Tensor teacher, std::optional<Tensor> margin, int64_t kind, double boundary,
                         int64_t over, double scale) {
  const ScalarType dtype = accumulator(student, teacher);
  const int64_t batch = student.size(0);
  Tensor out =
      over == kTotal ? empty(student, dtype, {}) : empty(student, dtype, {over == kSample ? batch : student.size(1)});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const Pair maps(student, teacher);
    A* to = static_cast<A*>(out.data_ptr());
    const auto put = [&](const std::vector<double>& sums) {
      for (double sum : sums) *to++ = static_cast<A>(scale * sum);
    };
    if (over == kChannel) return put(channel_squares<A>(maps));
    std::vector<double> sums(batch);
    const std::vector<A> channels = margin ? values_of<A>(*margin, 1) : std::vector<A>();
    dispatch_kind<A>(kind, boundary, false, [&](const auto& make) { maps.sum(0, batch, channels, make, sums.data()); });
    if (over == kSample) return put(sums);
    double total = 0;
    for (double sum : sums) total += sum;
    put({total});
  });
  return out;
}

std::tuple<Tensor, Tensor> feature_error_backward_cpu(Tensor grad, Tensor student, Tensor teacher,
                                                      std::optional<Tensor> margin, int64_t kind, double boundary,
                                                      int64_t over, double scale, bool need_student,
                                                      bool need_teacher) {
  Tensor grad_s = gradient(student, student, need_student), grad_t = gradient(teacher, student, need_teacher);
  dispatch_accumulator(accumulator(student, teacher), [&](auto tag) {
    using A = decltype(tag);
    const Pair maps(student, teacher);
    const std::vector<A> factors = values_of<A>(grad, scale);
    // Per channel it is the upstream gradient that the terms take, else the margin.
    const std::vector<A> channels = over == kChannel ? factors : margin ? values_of<A>(*margin, 1) : std::vector<A>();
    const auto factor = [&](int64_t b) { return over == kChannel ? A(1) : factors[over == kSample ? b : 0]; };
    dispatch_kind<A>(kind, boundary, over == kChannel, [&](const auto& make) {
      maps.slopes(channels, make, factor, Output(grad_s, need_student), Output(grad_t, need_teacher));
    });
  });
  return {grad_s, grad_t};
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

std::tuple<Tensor, Tensor> normalized_error_cpu(Tensor student, Tensor teacher, int64_t power) {
  const ScalarType dtype = accumulator(student, teacher);
  const int64_t batch = student.size(0);
  Tensor loss = empty(student, dtype, {}), stats = empty(student, dtype, {4, batch});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const Pair maps(student, teacher);
    std::vector<double> norms(2 * batch), sums(3 * batch);
    A* to = static_cast<A*>(stats.data_ptr());
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
    *static_cast<A*>(loss.data_ptr()) = static_cast<A>(total / std::max<double>(1, double(batch) * maps.size()));
  });
  return {loss, stats};
}

std::tuple<Tensor, Tensor> normalized_error_backward_cpu(Tensor grad, Tensor student, Tensor teacher, Tensor stats,
                                                         int64_t power, bool need_student, bool need_teacher) {
  Tensor grad_s = gradient(student, student, need_student), grad_t = gradient(teacher, student, need_teacher);
  dispatch_accumulator(stats.scalar_type(), [&](auto tag) {
    using A = decltype(tag);
    const Pair maps(student, teacher);
    const double elements = std::max<double>(1, double(maps.batch) * maps.size());
    const A factor = static_cast<A>(read<A>(column(grad), 0) / elements);
    const A* x = static_cast<const A*>(stats.data_ptr());
    dispatch_power<A>(power, [&](const auto& make) {
      maps.slopes(
          std::vector<A>(),
          [&](int64_t b) {
            const int64_t n = maps.batch;
            return make(x[b], x[n + b], x[2 * n + b], x[3 * n + b]);
          },
          [&](int64_t) { return factor; }, Output(grad_s, need_student), Output(grad_t, need_teacher));
    });
  });
  return {grad_s, grad_t};
}

Tensor pyramid_error_cpu(Tensor student, Tensor teacher) {
  const ScalarType dtype = accumulator(student, teacher);
  Tensor out = empty(student, dtype, {});
  dispatch_accumulator(dtype, [&](auto tag) {
    using A = decltype(tag);
    const PyramidMaps<A> maps(student, teacher);
    std::vector<double> losses(maps.tasks());
    for_each(maps.tasks(), maps.grain(), [&](int64_t task) {
      std::vector<A> lines;
      losses[task] = maps.template pooled<false>(task, lines);
    });
    double total = 0;
    for (double loss : losses) total += loss;
    *static_cast<A*>(out.data_ptr()) = static_cast<A>(total);
  });
  return out;
}

std::tuple<Tensor, Tensor> pyramid_error_backward_cpu(Tensor grad, Tensor student, Tensor teacher, bool need_student,
                                                      bool need_teacher) {
  Tensor grad_s = gradient(student, student, need_student), grad_t = gradient(teacher, student, need_teacher);
  const Output to_s(grad_s, need_student), to_t(grad_t, need_teacher);
  dispatch_accumulator(accumulator(student, teacher), [&](auto tag) {
    using A = decltype(tag);
    const PyramidMaps<A> maps(student, teacher);
    const A factor = read<A>(column(grad), 0), own = static_cast<A>(2 * maps.pyramid.own);
    for_each(maps.tasks(), maps.grain(), [&](int64_t task) {
      std::vector<A> lines, buffer;
      maps.template pooled<true>(task, lines);
      maps.for_lines(task, [&](const A* s, const A* t, int64_t n, int64_t segment, int64_t at) {
        buffer.resize(n);
        for (const Output& to : {to_s, to_t}) {
          if (!to.data) continue;
          A* out = target(to, at, buffer.data());
          write_line(s, t, lines.data() + segment * n, n, own, to.data == to_s.data ? factor : -factor, out);
          write(to, at, n, out);
        }
      });
    });
  });
  return {grad_s, grad_t};
}

}  // namespace
}  // namespace feature
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  using namespace kdfast::feature;
  m.impl("feature_error", TORCH_BOX(&feature_error_cpu));
  m.impl("feature_error_backward", TORCH_BOX(&feature_error_backward_cpu));
  m.impl("normalized_error", TORCH_BOX(&normalized_error_cpu));
  m.impl("normalized_error_backward", TORCH_BOX(&normalized_error_backward_cpu));
  m.impl("pyramid_error", TORCH_BOX(&pyramid_error_cpu));
  m.impl("pyramid_error_backward", TORCH_BOX(&pyramid_error_backward_cpu));
}
