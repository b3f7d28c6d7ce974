// Two Gram matrices compared, G of the student's rows and G' of the teacher's, entry by entry from statistics of the
// rows. A comparison knows the loss of an entry and M_ij = dL/dG_ij + dL/dG_ji (the rows' norms in G_ii aside), so that
//   dL/dx_i = sum_j M_ij x_j,
// and G being symmetric, M_ij needs the entry ij and the statistics of i and j alone.
// Comparisons of cosines c_ij = G_ij r_i r_j with r = 1 / (|x| + eps) also move r_i, through
//   M_ii -= (sum_j M_ij G_ij) r_i / |x_i|.
// A row that is 0 has r = 0: no cosine, no gradient. Includes no torch header; shared by CPU and CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "common/vector_math.h"

namespace kdfast {
namespace gram {

constexpr double kSmallestNorm = 1e-12;  // of a row of G
constexpr int kMaxTerms = 16;            // of a polynomial: MOST_TERMS of ops/gram.py
constexpr int kStats = 7;                // most statistics of a row

enum Side { kStudent, kTeacher };

template <class A>
KD_HD A sign(A x) {
  return static_cast<A>(x > 0) - static_cast<A>(x < 0);
}

template <class A>
KD_HD A norm_of(A square) {
  return std::sqrt(max(square, A(0)));
}

template <class A>
KD_HD A inverse_norm(A square, A eps) {
  const A norm = norm_of(square);
  return norm > 0 ? 1 / (norm + eps) : A(0);
}

// Rounding may pass 1. Held there, the product is a number of its own, which no compiler fuses with the subtraction of
// another cosine: that is exactly 0 where student and teacher agree.
template <class A>
KD_HD A cosine(A g, A r_i, A r_j) {
  const A c = g * (r_i * r_j);
  return c > 1 ? A(1) : c;
}

// log(1 + u), u > -1; exact where 1 + u is rounded to 1.
template <class A>
KD_HD A log_1p(A u) {
#if defined(__CUDA_ARCH__)
  return ::log1p(u);
#else
  const A x = 1 + u, d = x - 1;
  const A log = static_cast<A>(kLn2) * fast_log2(x);
  return d == 0 ? u : log * (u / d);
#endif
}

// q_i = G_i / |G_i|: squares or absolute values of q_ij - q'_ij.
template <class A, bool kAbsolute>
struct Rows {
  static constexpr bool kCosines = false;
  A scale;
  enum Stat { kInverseS, kInverseT, kRatio, kAlongS, kAlongT, kFactorS, kFactorT };

  template <class S>
  KD_HD void norms(double square_s, double square_t, int64_t i, const S& stats) const {
    const double norm_s = std::sqrt(square_s), norm_t = std::sqrt(square_t);
    const double s = norm_s > kSmallestNorm ? norm_s : kSmallestNorm,
                 t = norm_t > kSmallestNorm ? norm_t : kSmallestNorm;
    stats.put(kInverseS, i, static_cast<A>(1 / s));
    stats.put(kInverseT, i, static_cast<A>(1 / t));
    stats.put(kRatio, i, static_cast<A>(s / t));
    stats.put(kFactorS, i, norm_s > 0 ? static_cast<A>(scale / s) : A(0));
    stats.put(kFactorT, i, norm_t > 0 ? static_cast<A>(scale / t) : A(0));
  }

  // The difference comes before the scale: exactly 0 between equal rows, however the compiler contracts.
  template <class S>
  KD_HD A gap(A g, A h, int64_t i, const S& stats) const {
    return (g - h * stats.get(kRatio, i)) * stats.get(kInverseS, i);
  }

  KD_HD A entry(A gap) const { return kAbsolute ? std::abs(gap) : gap * gap; }
  KD_HD A slope(A gap) const { return kAbsolute ? sign(gap) : 2 * gap; }

  template <class S>
  KD_HD A share(Side side, A g, A h, int64_t i, const S& stats) const {
    const A u = slope(gap(g, h, i, stats));
    if (side == kStudent) return (u - g * stats.get(kInverseS, i) * stats.get(kAlongS, i)) * stats.get(kFactorS, i);
    return (-u - h * stats.get(kInverseT, i) * stats.get(kAlongT, i)) * stats.get(kFactorT, i);
  }

  template <class S>
  KD_HD A weight(Side side, A g, A h, int64_t i, int64_t j, const S& stats) const {
    return share(side, g, h, i, stats) + share(side, g, h, j, stats);
  }
};

// p_i = (1 + c_i) / sum: p' log((p' + eps) / (p + eps)).
template <class A>
struct Distribution {
  static constexpr bool kCosines = true;
  A scale, eps;
  enum Stat { kInverseS, kInverseT, kOverS, kOverT, kAlongS, kAlongT };  // kOver: 1 / sum_j (1 + c_ij)

  template <class S>
  KD_HD A sum_term(Side side, A g, int64_t i, int64_t j, const S& stats) const {
    const int r = side == kStudent ? kInverseS : kInverseT;
    return 1 + cosine(g, stats.get(r, i), stats.get(r, j));
  }

  // -> the loss; slopes in p and p', less a constant: that changes nothing, as each row of p sums to 1. What p' - p
  // takes from the loss sums to 0 as well, and leaves terms that are as small as their sum.
  KD_HD A entry(A p, A t, A& slope_s, A& slope_t) const {
    const A gap = t - p, log_ratio = log_1p(gap / (p + eps));
    slope_s = (eps - gap) / (p + eps);
    slope_t = log_ratio - eps / (t + eps);
    return t * log_ratio - gap;
  }

  template <class S>
  KD_HD A share(Side side, A c, A d, int64_t i, const S& stats) const {
    A slope_s, slope_t;
    entry(c * stats.get(kOverS, i), d * stats.get(kOverT, i), slope_s, slope_t);
    if (side == kStudent) return (slope_s - stats.get(kAlongS, i)) * stats.get(kOverS, i);
    return (slope_t - stats.get(kAlongT, i)) * stats.get(kOverT, i);
  }

  template <class S>
  KD_HD A weight(Side side, A g, A h, int64_t i, int64_t j, const S& stats) const {
    const A c = sum_term(kStudent, g, i, j, stats), d = sum_term(kTeacher, h, i, j, stats);
    const int r = side == kStudent ? kInverseS : kInverseT;
    return scale * (share(side, c, d, i, stats) + share(side, c, d, j, stats)) * (stats.get(r, i) * stats.get(r, j));
  }
};

// (K(c) - K(c'))^2 with a polynomial K of kTerms coefficients; without any, |c - c'|. Those of papers are compiled,
// others (kAnyTerms) loop.
constexpr int kAnyTerms = kMaxTerms + 1;

template <class A, int kTerms>
struct Cosines {
  static constexpr bool kCosines = true;
  A scale, eps;
  int64_t terms;
  A coefficients[kMaxTerms];
  enum Stat { kInverseS, kInverseT };

  KD_HD A value(A c, A& slope) const {
    A k = 0;
    slope = 0;
    for (int64_t p = kTerms == kAnyTerms ? terms : kTerms; p-- > 0;) {
      slope = slope * c + k;
      k = k * c + coefficients[p];
    }
    return k;
  }

  // -> the loss; slopes in c and c'.
  KD_HD A entry(A c, A d, A& slope_s, A& slope_t) const {
    if constexpr (kTerms == 0) {
      slope_s = sign(c - d);
      slope_t = -slope_s;
      return std::abs(c - d);
    }
    const A k = value(c, slope_s), l = value(d, slope_t), gap = k - l;
    slope_s *= 2 * gap;
    slope_t *= -2 * gap;
    return gap * gap;
  }

  template <class S>
  KD_HD A entry(A g, A h, int64_t i, int64_t j, const S& stats, A& slope_s, A& slope_t) const {
    return entry(cosine(g, stats.get(kInverseS, i), stats.get(kInverseS, j)),
                 cosine(h, stats.get(kInverseT, i), stats.get(kInverseT, j)), slope_s, slope_t);
  }

  template <class S>
  KD_HD A weight(Side side, A g, A h, int64_t i, int64_t j, const S& stats) const {
    A slope_s, slope_t;
    entry(g, h, i, j, stats, slope_s, slope_t);
    const int r = side == kStudent ? kInverseS : kInverseT;
    return 2 * scale * (side == kStudent ? slope_s : slope_t) * (stats.get(r, i) * stats.get(r, j));
  }
};

// Entries of two cosines in `affinity`, and their slopes: in c, and in c' with the other sign.
template <class A>
struct Gap {
  using Slope = float;  // holds every sign
  static constexpr bool kOneSlope = true;

  KD_HD A entry(A c, A d, A& slope_s, A& slope_t) const {
    const A gap = c - d;
    slope_s = slope_t = gap > 0 ? A(1) : gap < 0 ? A(-1) : A(0);
    return std::abs(gap);
  }
};

// kPositive: of max(c, 0) and max(c', 0). A NaN stays one.
template <class A, bool kPositive>
struct SquaredGap {
  using Slope = A;
  static constexpr bool kOneSlope = !kPositive;

  KD_HD A entry(A c, A d, A& slope_s, A& slope_t) const {
    const bool no_s = kPositive && c < 0, no_t = kPositive && d < 0;
    const A gap = (no_s ? A(0) : c) - (no_t ? A(0) : d);
    slope_s = no_s ? A(0) : 2 * gap;
    slope_t = no_t ? A(0) : 2 * gap;
    return gap * gap;
  }
};

// Statistics [kStats, rows] of the rows of all matrices, those of one matrix beginning at `first`.
template <class A>
struct Stats {
  A* data;
  int64_t rows, first;

  KD_HD A get(int stat, int64_t i) const { return data[stat * rows + first + i]; }
  KD_HD void put(int stat, int64_t i, A x) const { data[stat * rows + first + i] = x; }
};

// The comparison's name is checked in Python.
template <class A, class F>
void dispatch_comparison(const std::string& kind, double scale, double eps, const std::vector<double>& coefficients,
                         const F& f) {
  const A s = static_cast<A>(scale), e = static_cast<A>(eps);
  if (kind == "rows") return f(Rows<A, false>{s});
  if (kind == "rows_absolute") return f(Rows<A, true>{s});
  if (kind == "distribution") return f(Distribution<A>{s, e});
  const auto with = [&](auto terms) {
    Cosines<A, decltype(terms)::value> cosines{s, e, static_cast<int64_t>(coefficients.size()), {}};
    for (size_t p = 0; p < coefficients.size(); ++p) cosines.coefficients[p] = static_cast<A>(coefficients[p]);
    f(cosines);
  };
  switch (coefficients.size()) {
    case 0: return with(std::integral_constant<int, 0>{});
    case 2: return with(std::integral_constant<int, 2>{});
    case 3: return with(std::integral_constant<int, 3>{});
    default: return with(std::integral_constant<int, kAnyTerms>{});
  }
}

// So is this one's.
template <class A, class F>
void dispatch_affinity(const std::string& kind, const F& f) {
  if (kind == "absolute") return f(Gap<A>{});
  if (kind == "squared") return f(SquaredGap<A, false>{});
  return f(SquaredGap<A, true>{});
}

}  // namespace gram
}  // namespace kdfast
