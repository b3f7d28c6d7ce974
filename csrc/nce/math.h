// One anchor against rows of a memory bank by noise-contrastive estimation: row 0 is the positive, the others
// negatives.
//
// With the score s = anchor . row / T, the bank's constant Z, N rows, K negatives, and c = K / N + 1e-7,
//   positive: -log(P / (P + c)) = softplus(-v),    negative: -log((K / N) / (P + c)) = softplus(v) + log(1 + 1e-7 N /
//   K)
// where P = exp(s) / Z and v = s - log(Z c). The slopes in s are -sigmoid(-v) and sigmoid(v), so loss and gradient, the
// sum of slope * row, come from one read of each row, and no exponential overflows. Loops work in bits: v log2(e).
// Includes no torch header; shared by CPU and CUDA.
#pragma once

#include "common/vector_math.h"

namespace kdfast {
namespace nce {

constexpr double kEps = 1e-7;   // beside the density of the noise, as in the official code
constexpr int kAttempts = 256;  // draws before a negative of another class is looked for in the rows that follow

// log(1 + e) for 0 <= e <= 1. Error 1 ulp (interpolation of degree 9 of log(1 + e) / e at Chebyshev's points).
KD_HD float log1p_fraction(float e) {
#if defined(__CUDA_ARCH__)
  return ::log1pf(e);
#else
  float p = -0.00317605705f;
  p = p * e + 0.0195425274f;
  p = p * e - 0.0563736132f;
  p = p * e + 0.105436238f;
  p = p * e - 0.152696671f;
  p = p * e + 0.196632743f;
  p = p * e - 0.249516163f;
  p = p * e + 0.333297105f;
  p = p * e - 0.499998926f;
  p = p * e + 0.999999995f;
  return p * e;
#endif
}
KD_HD double log1p_fraction(double e) { return ::log1p(e); }

template <class A>
struct Term {
  A loss, slope;  // slope: in s
};

// The term of one row from its v in bits; `sign` is -1 for the positive, 1 for a negative, whose constant is left out.
template <class A>
KD_HD Term<A> term(A bits, A sign) {
  const A v = sign * bits, size = v < 0 ? -v : v;
  const A e = exp2(-size), whole = A(1) / (A(1) + e);
  return {max(v, A(0)) * A(kLn2) + log1p_fraction(e), sign * (v < 0 ? e * whole : whole)};
}

// What is the same for every row of one direction.
struct Direction {
  double rate;      // log2(e) / T: from a dot product to bits
  double shift;     // log2(Z c)
  double constant;  // of each negative

  KD_HD Direction(double z, double temperature, int64_t negatives, int64_t rows) {
    const double density = static_cast<double>(negatives) / rows;
    rate = kLog2E / temperature;
    shift = log2(z) + log2(density + kEps);
    constant = negatives ? ::log1p(kEps / density) : 0;
  }
};

// log2 of a sum of powers of two, kept as its largest exponent and the sum relative to it.
struct LogSum {
  double max = -infinity<double>(), sum = 0;

  KD_HD void add(const LogSum& other) {
    if (other.max == -infinity<double>()) return;
    const double largest = other.max > max ? other.max : max;  // NaN stays where it is, in the sum
    sum = (sum == 0 ? 0 : sum * exp2(max - largest)) + other.sum * exp2(other.max - largest);
    max = largest;
  }

  KD_HD double nats() const { return sum == 0 ? -infinity<double>() : kLn2 * (max + log2(sum)); }
};

// ---- drawing rows
// Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): four words from a key and a counter.
KD_HD void philox(uint64_t key, uint32_t column, uint32_t attempt, uint64_t row, uint32_t (&w)[4]) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  w[0] = column;
  w[1] = attempt;
  w[2] = static_cast<uint32_t>(row);
  w[3] = static_cast<uint32_t>(row >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * w[0], b = uint64_t(0xCD9E8D57u) * w[2];
    w[0] = static_cast<uint32_t>(b >> 32) ^ w[1] ^ k0;
    w[2] = static_cast<uint32_t>(a >> 32) ^ w[3] ^ k1;
    w[1] = static_cast<uint32_t>(b);
    w[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// How rows are drawn: uniformly from [0, rows), rows < 2^31, or by an alias table of (threshold, alias) in 2^-32.
struct Source {
  uint64_t key;
  int64_t rows;
  const int64_t* table;   // [rows, 2], or null
  const int64_t* labels;  // [rows], or null: rows of the positive's class are drawn again

  KD_HD int64_t pick(const uint32_t (&w)[4]) const {
    const uint64_t n = static_cast<uint64_t>(rows);
    const int64_t row = static_cast<int64_t>((w[0] * n + ((w[1] * n) >> 32)) >> 32);
    return !table || static_cast<int64_t>(w[2]) < table[2 * row] ? row : table[2 * row + 1];
  }

  // -1 where every row has the positive's class.
  KD_HD int64_t draw(int64_t positive, uint32_t column) const {
    uint32_t w[4];
    philox(key, column, 0, static_cast<uint64_t>(positive), w);
    int64_t row = pick(w);
    if (!labels) return row;
    const int64_t own = labels[positive];
    for (int attempt = 1; labels[row] == own && attempt < kAttempts; ++attempt) {
      philox(key, column, static_cast<uint32_t>(attempt), static_cast<uint64_t>(positive), w);
      row = pick(w);
    }
    for (int64_t step = 0; labels[row] == own; ++step) {
      if (step == rows) return -1;
      row = row + 1 < rows ? row + 1 : 0;
    }
    return row;
  }
};

}  // namespace nce
}  // namespace kdfast
