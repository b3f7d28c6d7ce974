#include <algorithm>
#include <numeric>
#include <vector>

#include "channel_kl/host.h"
#include "common/map_chunk.h"
#include "common/parallel.h"

namespace kdfast {
namespace channel_kl {
namespace {

// Work is cut into pieces of positions with all their channels, the same whatever the number of threads. A piece is
// read from memory once: what comes back to it finds it in a cache.
constexpr int64_t kPiece = 32 * 1024;  // elements
constexpr int64_t kGroup = 512;        // elements of the positions that lie side by side in one loop
constexpr int64_t kLine = 16;          // loops of so many elements have no remainder

// How the positions of a sample are taken: `group` at once, as so many more channels, in pieces of `positions`.
struct Plan {
  int64_t batch, channels, all, group, width, positions, pieces;

  Plan(int64_t batch, const Order& order) : batch(batch), channels(order.inner), all(order.outer) {
    const int64_t even = channels > 0 ? kLine / std::gcd(channels, kLine) : 1;
    group = channels < kGroup ? std::max<int64_t>(even, kGroup / std::max<int64_t>(channels, 1) / even * even) : 1;
    width = group * channels;
    positions = std::max<int64_t>(1, kPiece / std::max<int64_t>(width, 1)) * group;
    pieces = (all + positions - 1) / positions;
  }
  int64_t grain() const { return grain_for(std::min(all, positions) * channels); }
};

// The elements of a group of positions, of both sides.
template <class A>
struct Group {
  const A *t, *s;
  int64_t at, n;  // where in the sample, and how many of them exist
};

// Groups of one piece; those that do not exist are -inf, which adds nothing.
template <class A>
class Reader {
 public:
  Reader(const Plan& plan, const Map& student, const Map& teacher, const Order& order)
      : plan_(plan), student_(student), teacher_(teacher), order_(order), t_(plan.width), s_(plan.width) {}

  // f(group) for the groups of a piece of a sample.
  template <class F>
  void for_groups(int64_t sample, int64_t piece, const F& f) {
    const int64_t begin = piece * plan_.positions, end = std::min(plan_.all, begin + plan_.positions);
    for (int64_t position = begin; position < end; position += plan_.group) {
      const int64_t at = position * plan_.channels, n = std::min(plan_.group, end - position) * plan_.channels;
      f(Group<A>{get(teacher_, sample, at, n, t_.data()), get(student_, sample, at, n, s_.data()), at, n});
    }
  }

 private:
  const A* get(const Map& x, int64_t sample, int64_t at, int64_t n, A* buffer) const {
    const A* from = read(x, order_, sample, at, n, buffer);
    if (n == plan_.width) return from;
    if (from != buffer) std::copy_n(from, n, buffer);
    std::fill(buffer + n, buffer + plan_.width, -infinity<A>());
    return buffer;
  }

  const Plan& plan_;
  const Map &student_, &teacher_;
  const Order& order_;
  std::vector<A> t_, s_;
};

// ---- forward

// States of many channels, each in arrays.
template <class A>
struct States {
  A *max_p, *max_q, *sum_p, *sum_q, *dot;

  static constexpr int64_t kArrays = 5;
  States(A* memory, int64_t n)
      : max_p(memory), max_q(memory + n), sum_p(memory + 2 * n), sum_q(memory + 3 * n), dot(memory + 4 * n) {}

  void clear(int64_t n) const {
    std::fill(max_p, max_p + n, -infinity<A>());
    std::fill(max_q, max_q + n, -infinity<A>());
    for (A* sum : {sum_p, sum_q, dot}) std::fill(sum, sum + n, A(0));
  }
  KlState<A, A> at(int64_t i) const { return {max_p[i], max_q[i], sum_p[i], sum_q[i], dot[i]}; }
  void set(int64_t i, const KlState<A, A>& x) const {
    max_p[i] = x.max_p;
    max_q[i] = x.max_q;
    sum_p[i] = x.sum_p;
    sum_q[i] = x.sum_q;
    dot[i] = x.dot;
  }
  States from(int64_t i) const {
    States x(*this);
    for (A** array : {&x.max_p, &x.max_q, &x.sum_p, &x.sum_q, &x.dot}) *array += i;
    return x;
  }

  // Adds the states of as many others.
  void add(const States& other, int64_t n, A rate) const {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      KlState<A, A> x = at(i), y = other.at(i);
      const A top_p = max(x.max_p, y.max_p), top_q = max(x.max_q, y.max_q);
      x.rebase(top_p, top_q, rate);
      y.rebase(top_p, top_q, rate);
      x.sum_p += y.sum_p;
      x.sum_q += y.sum_q;
      x.dot += y.dot;
      set(i, x);
    }
  }
};

template <class A>
void add_maxima(const A* z, int64_t n, A* top) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) top[i] = z[i] > top[i] ? z[i] : top[i];
}

// The terms of elements whose maxima are known.
template <class A>
void add_terms(const A* t, const A* s, int64_t n, A rate, const States<A>& to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A c_p = t[i] - finite_max(to.max_p[i]), c_q = s[i] - finite_max(to.max_q[i]), e_p = exp2(c_p * rate);
    to.sum_p[i] += e_p;
    to.sum_q[i] += exp2(c_q * rate);
    to.dot[i] += kl_term(e_p, c_p - c_q);
  }
}

// The states of a piece's channels, at the front of `to`, which is as wide as a group.
template <class A>
void measure(Reader<A>& reader, const Plan& plan, int64_t sample, int64_t piece, A rate, const States<A>& to) {
  to.clear(plan.width);
  reader.for_groups(sample, piece, [&](const Group<A>& x) {
    add_maxima(x.t, plan.width, to.max_p);
    add_maxima(x.s, plan.width, to.max_q);
  });
  reader.for_groups(sample, piece, [&](const Group<A>& x) { add_terms(x.t, x.s, plan.width, rate, to); });
  for (int64_t i = 1; i < plan.group; ++i) to.add(to.from(i * plan.channels), plan.channels, rate);
}

// What turns elements into the terms of near channels: NearRow of many, each field in an array.
template <class A>
struct NearRows {
  std::vector<A> max_p, max_q, inverse_p, inverse_q, log2_ratio;
  A rate;

  NearRows(int64_t n, A rate) : max_p(n), max_q(n), inverse_p(n), inverse_q(n), log2_ratio(n), rate(rate) {}

  void set(int64_t i, const NearRow<A>& x) {
    max_p[i] = x.max_p;
    max_q[i] = x.max_q;
    inverse_p[i] = x.inverse_p;
    inverse_q[i] = x.inverse_q;
    log2_ratio[i] = x.log2_ratio;
  }
  // Those of the channels, for each of the positions of a group.
  void repeat(int64_t channels, int64_t group) {
    for (auto* values : {&max_p, &max_q, &inverse_p, &inverse_q, &log2_ratio}) {
      for (int64_t i = channels; i < channels * group; ++i) (*values)[i] = (*values)[i - channels];
    }
  }
};

template <class A>
void add_near_terms(const A* t, const A* s, int64_t n, const NearRows<A>& rows, A* sums) {
  const A *max_p = rows.max_p.data(), *max_q = rows.max_q.data(), *inverse_p = rows.inverse_p.data(),
          *inverse_q = rows.inverse_q.data(), *log2_ratio = rows.log2_ratio.data(), rate = rows.rate;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A p = exp2((t[i] - max_p[i]) * rate) * inverse_p[i], q = exp2((s[i] - max_q[i]) * rate) * inverse_q[i];
    const A gap = centred_gap(t[i], s[i], max_p[i], max_q[i]);
    sums[i] += near_term(p, q, A(kLn2) * (gap * rate - log2_ratio[i]));
  }
}

// The sums of a piece's near terms, for each channel of a sample.
template <class A>
void sum_near(Reader<A>& reader, const Plan& plan, int64_t sample, int64_t piece, const NearRows<A>& rows, A* wide,
              A* sums) {
  std::fill(wide, wide + plan.width, A(0));
  reader.for_groups(sample, piece, [&](const Group<A>& x) { add_near_terms(x.t, x.s, x.n, rows, wide); });
  for (int64_t i = 0; i < plan.channels; ++i) sums[i] = 0;
  for (int64_t i = 0; i < plan.width; ++i) sums[i % plan.channels] += wide[i];
}

// ---- backward

// KlGrad of a group's channels, each field in an array.
template <class A>
struct Slopes {
  static constexpr int64_t kArrays = 7;
  const A *max_p, *max_q, *factor, *of_q, *of_p, *slope, *offset;

  Slopes(const A* memory, int64_t n)
      : max_p(memory),
        max_q(memory + n),
        factor(memory + 2 * n),
        of_q(memory + 3 * n),
        of_p(memory + 4 * n),
        slope(memory + 5 * n),
        offset(memory + 6 * n) {}

  // Into memory for n of them, for channel c of each position.
  static void set(A* memory, int64_t n, int64_t channels, int64_t c, A max_p, A max_q, const KlGrad<A>& g) {
    const A values[kArrays] = {max_p, max_q, g.factor, g.of_q, g.of_p, g.slope, g.offset};
    for (int64_t k = 0; k < kArrays; ++k) {
      for (int64_t i = c; i < n; i += channels) memory[k * n + i] = values[k];
    }
  }
};

template <class A>
void write_student(const A* t, const A* s, int64_t n, A rate, const Slopes<A>& g, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A e_p = exp2((t[i] - g.max_p[i]) * rate), e_q = exp2((s[i] - g.max_q[i]) * rate);
    out[i] = g.factor[i] * (g.of_q[i] * e_q - g.of_p[i] * e_p);
  }
}

template <class A>
void write_teacher(const A* t, const A* s, int64_t n, A rate, const Slopes<A>& g, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A c_p = t[i] - g.max_p[i], c_q = s[i] - g.max_q[i], e_p = exp2(c_p * rate), slope = g.slope[i];
    const A along = slope == 0 ? g.offset[i] : slope * (c_p - c_q) + g.offset[i];
    out[i] = e_p == 0 ? A(0) : e_p * along;
  }
}

struct Cpu : HostBackend {
  using HostBackend::HostBackend;

  template <class A>
  void forward(const Tensor& student, const Tensor& teacher, const Order& order, double temperature,
               const Statistics<A>& statistics, A* loss) const {
    const Plan plan(student.size(0), order);
    const Map s = map(student, order), t = map(teacher, order);
    const A rate = static_cast<A>(kLog2E / temperature);
    const int64_t channels = plan.channels, of_piece = States<A>::kArrays * channels;
    std::vector<A> memory(plan.batch * plan.pieces * of_piece);
    for_ranges(plan.batch * plan.pieces, plan.grain(), [&](int64_t begin, int64_t end) {
      Reader<A> reader(plan, s, t, order);
      std::vector<A> wide(States<A>::kArrays * plan.width);
      const States<A> states(wide.data(), plan.width);
      for (int64_t task = begin; task < end; ++task) {
        measure(reader, plan, task / plan.pieces, task % plan.pieces, rate, states);
        const States<A> to(memory.data() + task * of_piece, channels);
        for (int64_t c = 0; c < channels; ++c) to.set(c, states.at(c));
      }
    });
    std::vector<char> near(plan.batch);  // samples with a channel that is
    for_each(plan.batch, grain_for(plan.pieces * of_piece), [&](int64_t sample) {
      A* const parts = memory.data() + sample * plan.pieces * of_piece;
      const States<A> sums(parts, channels);
      for (int64_t piece = 1; piece < plan.pieces; ++piece) {
        sums.add(States<A>(parts + piece * of_piece, channels), channels, rate);
      }
      for (int64_t c = 0, row = sample * channels; c < channels; ++c, ++row) {
        const KlState<A, A> state = plan.pieces > 0 ? sums.at(c) : KlState<A, A>{};
        statistics.set(row, state, state.kl(rate));
        if (statistics.is_near(row)) near[sample] = true;
      }
    });
    if (std::find(near.begin(), near.end(), true) != near.end()) {
      sum_near_rows(plan, s, t, order, rate, near, memory, statistics);
    }
    const double rows = static_cast<double>(std::max<int64_t>(statistics.rows, 1));
    double sum = 0;
    for (int64_t row = 0; row < statistics.rows; ++row) sum += statistics.at(kKl, row);
    *loss = static_cast<A>(temperature * temperature / rows * sum);
  }

  // The channels that are near, once more; `memory` has room for the sums of the pieces.
  template <class A>
  static void sum_near_rows(const Plan& plan, const Map& s, const Map& t, const Order& order, A rate,
                            const std::vector<char>& near, std::vector<A>& memory, const Statistics<A>& statistics) {
    const int64_t channels = plan.channels;
    for_ranges(plan.batch * plan.pieces, plan.grain(), [&](int64_t begin, int64_t end) {
      Reader<A> reader(plan, s, t, order);
      NearRows<A> rows(plan.width, rate);
      std::vector<A> wide(plan.width);
      int64_t current = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / plan.pieces;
        if (!near[sample]) continue;
        for (int64_t c = 0; c < channels && current != sample; ++c) {
          rows.set(c, statistics.near(sample * channels + c, rate));
        }
        if (current != sample) rows.repeat(channels, plan.group);
        current = sample;
        sum_near(reader, plan, sample, task % plan.pieces, rows, wide.data(), memory.data() + task * channels);
      }
    });
    for (int64_t row = 0; row < statistics.rows; ++row) {
      if (!statistics.is_near(row)) continue;
      const A* sums = memory.data() + row / channels * plan.pieces * channels + row % channels;
      double total = 0;
      for (int64_t piece = 0; piece < plan.pieces; ++piece) total += sums[piece * channels];
      statistics.at(kKl, row) = static_cast<A>(total);
    }
  }

  template <class A>
  void backward(const Column& grad, const Tensor& student, const Tensor& teacher, const Order& order,
                double temperature, const Statistics<A>& statistics, const MapGrad& to_student,
                const MapGrad& to_teacher) const {
    const Plan plan(student.size(0), order);
    const Map s = map(student, order), t = map(teacher, order);
    const A rate = static_cast<A>(kLog2E / temperature);
    const A scale = read<A>(grad, 0) * static_cast<A>(temperature / static_cast<double>(statistics.rows));
    for_ranges(plan.batch * plan.pieces, plan.grain(), [&](int64_t begin, int64_t end) {
      Reader<A> reader(plan, s, t, order);
      std::vector<A> memory(Slopes<A>::kArrays * plan.width), buffer(plan.width);
      const Slopes<A> slopes(memory.data(), plan.width);
      int64_t current = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / plan.pieces;
        for (int64_t c = 0; c < plan.channels && current != sample; ++c) {
          const int64_t row = sample * plan.channels + c;
          Slopes<A>::set(memory.data(), plan.width, plan.channels, c, statistics.at(kMaxT, row),
                         statistics.at(kMaxS, row), statistics.gradient(row, scale, rate));
        }
        current = sample;
        reader.for_groups(sample, task % plan.pieces, [&](const Group<A>& x) {
          const auto side = [&](const MapGrad& to, const auto& write_slopes) {
            const int64_t at = sample * order.size() + x.at;
            A* out = target(to, at, buffer.data());
            if (!out) return;
            write_slopes(x.t, x.s, x.n, rate, slopes, out);
            write(to, at, x.n, out);
          };
          side(to_student, write_student<A>);
          side(to_teacher, write_teacher<A>);
        });
      }
    });
  }
};

}  // namespace
}  // namespace channel_kl
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { kdfast::channel_kl::register_ops<kdfast::channel_kl::Cpu>(m); }
