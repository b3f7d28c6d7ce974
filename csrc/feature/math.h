// Terms of the losses that compare two feature maps element by element: s of the student, t of the teacher.
//
//   square      (s - t)^2
//   boundary    max(0, m - s)^2 where t > 0, max(0, s + m)^2 elsewhere; no slope in t
//   partial     (s - u)^2, u = max(t, m), but 0 where s <= u <= 0
//   normalized  |d|^p, d = s / |s| - t / |t|, |s| and |t| the norms of the sample
//
// Each has up to three values that are summed (`kSums`), and its slopes in s and t. Of the normalized terms v and slope
// v', dL/ds = (v' - n dot) / |s| with n = s / |s| and dot = sum v' n, which is summed beside v.
// Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/vector_math.h"

namespace kdfast {
namespace feature {

// What feature_error computes, and over what it sums, as kdfast/ops/feature.py numbers them.
enum Kind { kSquare, kBoundary, kPartial };
enum Over { kTotal, kSample, kChannel };

template <class A>
struct ErrorTerms {
  A x, y, z;
};

template <class A>
struct Slopes {
  A student, teacher;
};

// (s - t)^2, with slopes times `m`, the weight of the element's channel.
template <class A>
struct Square {
  static constexpr int kSums = 1;
  static constexpr bool kPerChannel = true;

  KD_HD ErrorTerms<A> terms(A s, A t, A) const { return {(s - t) * (s - t), A(0), A(0)}; }
  KD_HD Slopes<A> slopes(A s, A t, A m) const {
    const A slope = A(2) * m * (s - t);
    return {slope, -slope};
  }
};

template <class A>
struct PlainSquare : Square<A> {
  static constexpr bool kPerChannel = false;

  KD_HD Slopes<A> slopes(A s, A t, A) const { return Square<A>::slopes(s, t, A(1)); }
};

template <class A>
struct Boundary {
  static constexpr int kSums = 1;
  static constexpr bool kPerChannel = false;
  A margin;

  // How far the student is from its side of 0. A NaN stays one.
  KD_HD A gap(A s, A t) const {
    const A x = margin + (t > A(0) ? -s : s), held = x < A(0) ? A(0) : x;
    return t == t ? held : t;
  }
  KD_HD ErrorTerms<A> terms(A s, A t, A) const {
    const A x = gap(s, t);
    return {x * x, A(0), A(0)};
  }
  KD_HD Slopes<A> slopes(A s, A t, A) const {
    const A x = A(2) * gap(s, t);
    return {t > A(0) ? -x : x, A(0)};
  }
};

// `m` is the margin of the element's channel.
template <class A>
struct Partial {
  static constexpr int kSums = 1;
  static constexpr bool kPerChannel = true;

  KD_HD A gap(A s, A t, A m) const {
    const A u = (t < m ? m : t) + (m == m ? A(0) : m);  // the second part only lets a NaN through
    return (s <= u) & (u <= A(0)) ? A(0) : s - u;
  }
  KD_HD ErrorTerms<A> terms(A s, A t, A m) const {
    const A d = gap(s, t, m);
    return {d * d, A(0), A(0)};
  }
  // Where teacher and margin are equal, each is half of the maximum.
  KD_HD Slopes<A> slopes(A s, A t, A m) const {
    const A d = gap(s, t, m), share = t == m ? A(-1) : t < m ? A(0) : A(-2);
    return {A(2) * d, share * d};
  }
};

// Squared lengths of both samples.
template <class A>
struct Lengths {
  static constexpr int kSums = 2;
  static constexpr bool kPerChannel = false;

  KD_HD ErrorTerms<A> terms(A s, A t, A) const { return {s * s, t * t, A(0)}; }
};

constexpr double kSmallestNorm = 1e-12;

// What the samples' norms and dots make of the terms. The teacher is scaled to the student's norm before the difference
// is taken, so that no fused multiply-add leaves a rounding between equal samples.
template <class A, int kPower>
struct Normalized {
  static constexpr int kSums = 3;
  static constexpr bool kPerChannel = false;
  A inverse_s, inverse_t, ratio, dot_s = 0, dot_t = 0, scale_s = 0, scale_t = 0;

  KD_HD Normalized(A norm_s, A norm_t) {
    const A floor = static_cast<A>(kSmallestNorm), held_s = max(norm_s, floor), held_t = max(norm_t, floor);
    inverse_s = A(1) / held_s;
    inverse_t = A(1) / held_t;
    ratio = held_s / held_t;
  }
  // A norm at its floor is a constant; a sample of zeros has no direction to turn to.
  KD_HD Normalized(A norm_s, A norm_t, A sum_s, A sum_t) : Normalized(norm_s, norm_t) {
    const A floor = static_cast<A>(kSmallestNorm);
    dot_s = norm_s > floor ? sum_s : A(0);
    dot_t = norm_t > floor ? sum_t : A(0);
    scale_s = norm_s == A(0) ? A(0) : inverse_s;
    scale_t = norm_t == A(0) ? A(0) : inverse_t;
  }
  KD_HD A gap(A s, A t) const { return (s - t * ratio) * inverse_s; }
  KD_HD static A slope(A d) {
    if (kPower == 2) return A(2) * d;
    return d > A(0) ? A(1) : d < A(0) ? A(-1) : d;
  }
  KD_HD ErrorTerms<A> terms(A s, A t, A) const {
    const A d = gap(s, t), v = slope(d);
    return {kPower == 2 ? d * d : v * d, v * (s * inverse_s), v * (t * inverse_t)};
  }
  KD_HD Slopes<A> slopes(A s, A t, A) const {
    const A v = slope(gap(s, t));
    return {scale_s * (v - s * inverse_s * dot_s), -scale_t * (v - t * inverse_t * dot_t)};
  }
};

// ---- the pyramid of averages (HCL)

constexpr int kLevels = 3;       // of 4, 2 and 1 windows in each direction
constexpr int kMaxSegments = 7;  // that the windows' ends cut an axis into
constexpr int kMaxCells = kMaxSegments * kMaxSegments;

KD_HD int windows_of(int level) { return level == 0 ? 4 : level == 1 ? 2 : 1; }

// An axis of a map, cut where a window of any level begins or ends: each window is a run of whole segments.
struct Axis {
  int segments = 0;
  int64_t begin[kMaxSegments + 1];
  int8_t first[kLevels][4], last[kLevels][4];  // window -> its segments [first, last)

  explicit Axis(int64_t size) {
    begin[0] = 0;
    for (int64_t at = 0; at < size;) {  // the next cut
      int64_t next = size;
      for (int level = 0; level < kLevels; ++level) {
        for (int w = 0; w < windows_of(level); ++w) {
          if (start(size, level, w) > at) next = least(next, start(size, level, w));
          if (end(size, level, w) > at) next = least(next, end(size, level, w));
        }
      }
      begin[++segments] = at = next;
    }
    for (int level = 0; level < kLevels; ++level) {
      for (int w = 0; w < windows_of(level); ++w) {
        first[level][w] = index(start(size, level, w));
        last[level][w] = index(end(size, level, w));
      }
    }
  }
  // Of adaptive average pooling.
  static int64_t start(int64_t size, int level, int w) { return w * size / windows_of(level); }
  static int64_t end(int64_t size, int level, int w) {
    return ((w + 1) * size + windows_of(level) - 1) / windows_of(level);
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  int8_t index(int64_t at) const {
    int8_t i = 0;
    while (begin[i] != at) ++i;
    return i;
  }
};

// Which levels a map has, and what their terms weigh.
struct Pyramid {
  Axis rows, columns;
  int64_t height, width;
  int first_level = 0;
  double own, level[kLevels];  // weight of a squared difference, of a squared average

  Pyramid(int64_t maps, int64_t height, int64_t width) : rows(height), columns(width), height(height), width(width) {
    while (first_level < kLevels && windows_of(first_level) >= height) ++first_level;
    double weight = 1, total = 1;
    for (int k = first_level; k < kLevels; ++k) total += weight /= 2;
    total *= static_cast<double>(maps < 1 ? 1 : maps);
    own = 1 / (total * static_cast<double>(height) * static_cast<double>(width));
    weight = 1;
    for (int k = first_level; k < kLevels; ++k) {
      weight /= 2;
      level[k] = weight / (total * windows_of(k) * windows_of(k));
    }
  }

  KD_HD int cells() const { return rows.segments * columns.segments; }

  // f(weight, number of positions, rows [first, last), columns [first, last)) of each window; bounds are segments.
  template <class F>
  KD_HD void for_windows(const F& f) const {
    for (int k = first_level; k < kLevels; ++k) {
      for (int i = 0; i < windows_of(k); ++i) {
        for (int j = 0; j < windows_of(k); ++j) {
          const int top = rows.first[k][i], bottom = rows.last[k][i];
          const int left = columns.first[k][j], right = columns.last[k][j];
          const int64_t size = (rows.begin[bottom] - rows.begin[top]) * (columns.begin[right] - columns.begin[left]);
          f(level[k], size, top, bottom, left, right);
        }
      }
    }
  }
};

// The averages of one channel, from the sums of the differences in each cell, `stride` apart: -> their weighted
// squares. With kGradient the sums become the slopes that the averages give to each element of the cell. V is A, or a
// vector of them, with a channel in each lane.
template <bool kGradient, class V, class A = V>
KD_HD V pool(const Pyramid& p, V* cells, int64_t stride) {
  V loss{}, slopes[kMaxCells];
  const int across = p.columns.segments;
  if (kGradient) {
    for (int c = 0; c < p.cells(); ++c) slopes[c] = V{};
  }
  p.for_windows([&](double weight, int64_t size, int top, int bottom, int left, int right) {
    V sum{};
    for (int y = top; y < bottom; ++y) {
      for (int x = left; x < right; ++x) sum += cells[(y * across + x) * stride];
    }
    const V average = sum / static_cast<A>(size);
    loss += static_cast<A>(weight) * average * average;
    if (!kGradient) return;
    const V slope = static_cast<A>(2 * weight / static_cast<double>(size)) * average;
    for (int y = top; y < bottom; ++y) {
      for (int x = left; x < right; ++x) slopes[y * across + x] += slope;
    }
  });
  if (kGradient) {
    for (int c = 0; c < p.cells(); ++c) cells[c * stride] = slopes[c];
  }
  return loss;
}

}  // namespace feature
}  // namespace kdfast
