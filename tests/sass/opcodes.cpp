// What the opcodes of sm_90 compute. A maker reads the modifiers and operands of one instruction and gives the function
// that runs it; what it does not read, or does not know, is a fault with its name. Opcodes of the uniform datapath are
// those without the U.
//
// Arithmetic is IEEE's, as the hardware's is. MUFU, of which the hardware computes some 22 bits, is rounded correctly
// here; like the hardware's it takes and gives 0 for what is below the smallest normal number.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <iterator>
#include <limits>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "machine.h"

namespace sass {

const char* const kClassNames[kClasses] = {"fp32",   "fp64",   "int",   "mufu",     "convert", "move",
                                           "global", "shared", "local", "constant", "warp",    "control"};

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using Space = Warp::Space;

// ---- helpers
template <class F, class... T>
Mask where(F f, const T&... x) {
  Mask lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) lanes |= Mask{f(x[lane]...)} << lane;
  return lanes;
}

Vec<uint32_t> ones(Mask lanes) {
  Vec<uint32_t> x;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = lanes >> lane & 1;
  return x;
}

// Not inlined, so that nothing moves across the change of the rounding mode.
template <class F, class... T>
__attribute__((noinline)) auto each_apart(F f, const T&... x) {
  asm volatile("" ::: "memory");
  return each(f, x...);
}

template <class F, class... T>
auto rounded(int mode, F f, const T&... x) {
  if (mode == FE_TONEAREST) return each(f, x...);
  fesetround(mode);
  const auto y = each_apart(f, x...);
  fesetround(FE_TONEAREST);
  return y;
}

int rounding(Source& s) {
  constexpr int modes[] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
  return modes[s.one_of({"", "RM", "RP", "RZ"})];
}

template <class T>
T flushed(T x) {
  return std::abs(x) < std::numeric_limits<T>::min() ? std::copysign(T{0}, x) : x;
}

// A term of a sum of 32-bit integers: -x is ~x + 1, whose carry says that nothing was borrowed.
uint64_t addend(uint32_t x, bool negative, bool inverted) {
  return negative ? uint64_t{static_cast<uint32_t>(~x)} + 1 : inverted ? static_cast<uint32_t>(~x) : x;
}

Vec<uint64_t> addends(const Warp& w, const Operand& x) {
  return each([&](uint32_t v) { return addend(v, x.negative, x.inverted); }, w.raw(x));
}

uint32_t low(uint64_t x) { return static_cast<uint32_t>(x); }
uint64_t join(uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; }

// Puts the carries of sums into the predicates: whether there is one, whether there are two.
void put_carries(Warp& w, const std::vector<Operand>& to, Mask lanes, const Vec<uint64_t>& sum) {
  for (size_t i = 0; i < to.size(); ++i) {
    w.put(to[i], lanes, where([&](uint64_t x) { return x >> 32 > i; }, sum));
  }
}

Operand nothing() {
  Operand x;
  x.kind = Operand::kRegister;
  return x;
}

// An operand as a type; a bool is a predicate.
template <class T>
Vec<T> read(const Warp& w, const Operand& x) {
  if constexpr (std::is_same_v<T, bool>) {
    return each([](uint32_t bit) { return bit != 0; }, ones(w.mask(x)));
  } else if constexpr (std::is_same_v<T, float>) {
    return w.floats(x);
  } else if constexpr (std::is_same_v<T, double>) {
    return w.doubles(x);
  } else if constexpr (std::is_same_v<T, uint64_t>) {
    return w.longs(x);
  } else {
    return w.words(x);
  }
}

template <class... T, size_t... kOperands, class F>
Run apply(const Source& s, std::index_sequence<kOperands...>, F f) {
  const Operand to = s.at(0);
  const std::array<Operand, sizeof...(T)> from = {s.at(kOperands + 1)...};
  return [=](Warp& w, Mask m) { w.put(to, m, each(f, read<T>(w, from[kOperands])...)); };
}

// f of the operands after the first one, which gets the result.
template <class... T, class F>
Run apply(const Source& s, F f) {
  return apply<T...>(s, std::index_sequence_for<T...>{}, f);
}

// ---- integers
Run iadd3(Source& s) {
  const bool extended = s.has("X");
  const std::vector<Operand> carries = s.predicates(1);
  const size_t i = 1 + carries.size();
  const Operand to = s.at(0), a = s.at(i), b = s.at(i + 1), c = s.at(i + 2);
  const Operand p = extended ? s.at(i + 3) : to, q = extended ? s.at(i + 4) : to;
  return [=](Warp& w, Mask m) {
    auto sum =
        each([](uint64_t x, uint64_t y, uint64_t z) { return x + y + z; }, addends(w, a), addends(w, b), addends(w, c));
    if (extended) {
      sum = each([](uint64_t x, uint32_t y, uint32_t z) { return x + y + z; }, sum, ones(w.mask(p)), ones(w.mask(q)));
    }
    w.put(to, m, each(low, sum));
    put_carries(w, carries, m, sum);
  };
}

Run imad(Source& s) {
  const bool wide = s.has("WIDE"), high = s.has("HI"), extended = s.has("X"), is_unsigned = s.has("U32");
  s.one_of({"", "MOV", "IADD", "SHL"});
  const std::vector<Operand> carries = s.predicates(1);
  const size_t i = 1 + carries.size();
  const Operand to = s.at(0), a = s.at(i), b = s.at(i + 1), c = s.at(i + 2);
  if (wide || high) {
    return [=](Warp& w, Mask m) {
      const auto product = each(
          [&](uint32_t x, uint32_t y) {
            const int64_t both = int64_t{static_cast<int32_t>(x)} * static_cast<int32_t>(y);
            return is_unsigned ? uint64_t{x} * y : static_cast<uint64_t>(both);
          },
          w.words(a), w.words(b));
      const auto more = w.longs(c);
      const auto sum = each([](uint64_t x, uint64_t y) { return x + y; }, product, more);
      if (wide) {
        w.put(to, m, sum);
      } else {
        w.put(to, m, each([](uint64_t x) { return low(x >> 32); }, sum));
      }
      if (!carries.empty()) w.put(carries[0], m, where([](uint64_t x, uint64_t y) { return x < y; }, sum, more));
    };
  }
  if (!carries.empty()) throw Fault("unknown form of opcode IMAD");
  const Operand p = extended ? s.at(i + 3) : to;
  return [=](Warp& w, Mask m) {
    auto sum = each([](uint32_t x, uint32_t y, uint32_t z) { return x * y + z; }, w.words(a), w.words(b), w.words(c));
    if (extended) sum = each([](uint32_t x, uint32_t y) { return x + y; }, sum, ones(w.mask(p)));
    w.put(to, m, sum);
  };
}

Run lea(Source& s) {
  const bool high = s.has("HI"), extended = s.has("X"), sign = s.has("SX32");
  const std::vector<Operand> carries = s.predicates(1);
  size_t i = 1 + carries.size();
  const Operand to = s.at(0), a = s.at(i), b = s.at(i + 1);
  i += 2;
  const Operand c = high && !sign ? s.at(i++) : nothing();
  const int shift = static_cast<int>(s.at(i++).value);
  const Operand p = extended ? s.at(i) : to;
  if (a.inverted || (a.negative && high)) throw Fault("unknown form of opcode LEA");
  return [=](Warp& w, Mask m) {
    auto sum = each(
        [&](uint32_t x, uint32_t upper, uint64_t y) {
          uint64_t both = join(x, sign ? static_cast<uint32_t>(static_cast<int32_t>(x) >> 31) : upper) << shift;
          if (high) both >>= 32;
          return addend(low(both), a.negative, false) + y;
        },
        w.raw(a), w.raw(c), addends(w, b));
    if (extended) sum = each([](uint64_t x, uint32_t y) { return x + y; }, sum, ones(w.mask(p)));
    w.put(to, m, each(low, sum));
    put_carries(w, carries, m, sum);
  };
}

Run shf(Source& s) {
  const bool left = s.one_of({"L", "R"}) == 0, high = s.has("HI"), wraps = s.has("W");
  const int type = s.one_of({"U32", "S32", "U64", "S64"});
  const bool is_signed = type % 2, is_long = type > 1;
  return apply<uint32_t, uint32_t, uint32_t>(s, [=](uint32_t x, uint32_t n, uint32_t upper) {
    const uint64_t both = join(x, upper);
    n = wraps ? n & (is_long ? 63 : 31) : std::min(n, is_long ? 63u : 32u);
    uint64_t y = left ? both << n : both >> n;
    if (is_signed && !left) y = static_cast<uint64_t>(static_cast<int64_t>(both) >> n);
    return low(high ? y >> 32 : y);
  });
}

Run lop3(Source& s) {
  if (!s.has("LUT")) throw Fault("unknown form of opcode LOP3");
  const std::vector<Operand> any = s.predicates(0);
  const size_t i = any.size();
  const Operand to = s.at(i), a = s.at(i + 1), b = s.at(i + 2), c = s.at(i + 3), before = s.at(i + 5);
  const int table = static_cast<int>(s.at(i + 4).value);
  return [=](Warp& w, Mask m) {
    const auto x = w.words(a), y = w.words(b), z = w.words(c);
    Vec<uint32_t> all = {};
    for (int i = 0; i < 8; ++i) {
      if (!(table >> i & 1)) continue;
      const uint32_t not_x = i & 4 ? 0 : ~0u, not_y = i & 2 ? 0 : ~0u, not_z = i & 1 ? 0 : ~0u;
      for (int l = 0; l < kLanes; ++l) all[l] |= (x[l] ^ not_x) & (y[l] ^ not_y) & (z[l] ^ not_z);
    }
    w.put(to, m, all);
    if (!any.empty()) w.put(any[0], m, where([](uint32_t v) { return v != 0; }, all) | w.mask(before));
  };
}

Run plop3(Source& s) {
  if (!s.has("LUT")) throw Fault("unknown form of opcode PLOP3");
  const Operand to = s.at(0), other = s.at(1), a = s.at(2), b = s.at(3), c = s.at(4);
  const int table = static_cast<int>(s.at(5).value), second = static_cast<int>(s.at(6).value);
  return [=](Warp& w, Mask m) {
    const auto index = each([](uint32_t x, uint32_t y, uint32_t z) { return x << 2 | y << 1 | z; }, ones(w.mask(a)),
                            ones(w.mask(b)), ones(w.mask(c)));
    w.put(to, m, where([&](uint32_t i) { return (table >> i & 1) != 0; }, index));
    w.put(other, m, where([&](uint32_t i) { return (second >> i & 1) != 0; }, index));
  };
}

Run prmt(Source& s) {
  return apply<uint32_t, uint32_t, uint32_t>(s, [](uint32_t x, uint32_t which, uint32_t y) {
    uint32_t all = 0;
    for (int i = 0; i < 4; ++i, which >>= 4) {
      uint32_t byte = join(x, y) >> 8 * (which & 7) & 0xff;
      if (which & 8) byte = byte & 0x80 ? 0xff : 0;
      all |= byte << 8 * i;
    }
    return all;
  });
}

Run sel(Source& s) {
  return apply<uint32_t, uint32_t, bool>(s, [](uint32_t x, uint32_t y, bool first) { return first ? x : y; });
}

Run mov(Source& s) {
  return apply<uint32_t>(s, [](uint32_t x) { return x; });
}

Run viadd(Source& s) {
  return apply<uint32_t, uint32_t>(s, [](uint32_t x, uint32_t y) { return x + y; });
}

Run iabs(Source& s) {
  return apply<uint32_t>(s, [](uint32_t x) { return x >> 31 ? 0 - x : x; });
}

Mask combined(int how, Mask x, Mask y) { return how == 0 ? x & y : how == 1 ? x | y : x ^ y; }

template <class T>
bool compare_integers(int how, T x, T y) {
  switch (how) {
    case 0: return x == y;
    case 1: return x != y;
    case 2: return x < y;
    case 3: return x <= y;
    case 4: return x > y;
    default: return x >= y;
  }
}

Run isetp(Source& s) {
  const int how = s.one_of({"EQ", "NE", "LT", "LE", "GT", "GE"}), combine = s.one_of({"AND", "OR", "XOR"});
  const bool is_unsigned = s.has("U32"), extended = s.has("EX");
  const Operand to = s.at(0), other = s.at(1), a = s.at(2), b = s.at(3), with = s.at(4);
  const Operand lower = extended ? s.at(5) : with;
  return [=](Warp& w, Mask m) {
    // Of upper halves: where they are equal the lower ones decide.
    const auto compare = [&](uint32_t x, uint32_t y, uint32_t low_says) {
      if (extended && x == y) return low_says != 0;
      return is_unsigned ? compare_integers(how, x, y)
                         : compare_integers(how, static_cast<int32_t>(x), static_cast<int32_t>(y));
    };
    const Mask yes = where(compare, w.words(a), w.words(b), ones(w.mask(lower))), given = w.mask(with);
    w.put(to, m, combined(combine, yes, given));
    w.put(other, m, combined(combine, ~yes, given));
  };
}

// The smaller or the larger one.
uint32_t pick(uint32_t x, uint32_t y, bool smaller, bool is_unsigned) {
  const bool less = is_unsigned ? x < y : static_cast<int32_t>(x) < static_cast<int32_t>(y);
  return less == smaller ? x : y;
}

Run vimnmx(Source& s) {
  const bool is_unsigned = s.has("U32");
  return apply<uint32_t, uint32_t, bool>(
      s, [=](uint32_t x, uint32_t y, bool smaller) { return pick(x, y, smaller, is_unsigned); });
}

template <class First>
Run vimnmx3(Source& s, First first) {
  const bool is_unsigned = s.has("U32");
  return apply<uint32_t, uint32_t, uint32_t, bool>(s, [=](uint32_t x, uint32_t y, uint32_t z, bool smaller) {
    return pick(first(x, y, smaller, is_unsigned), z, smaller, is_unsigned);
  });
}

Run vimnmx3(Source& s) { return vimnmx3(s, pick); }

Run viaddmnmx(Source& s) {
  return vimnmx3(s, [](uint32_t x, uint32_t y, bool, bool) { return x + y; });
}

// ---- floating point
// f of two or three numbers.
template <class T, int kCount, class F>
Run arithmetic(Source& s, F f) {
  const bool flush = s.has("FTZ"), saturate = s.has("SAT");
  const int mode = rounding(s);
  const Operand to = s.at(0), a = s.at(1), b = s.at(2), c = s.at(kCount == 3 ? 3 : 2);
  return [=](Warp& w, Mask m) {
    auto x = read<T>(w, a), y = read<T>(w, b), z = read<T>(w, c);
    if (flush) x = each(flushed<T>, x), y = each(flushed<T>, y), z = each(flushed<T>, z);
    auto r = rounded(mode, f, x, y, z);
    if (flush) r = each(flushed<T>, r);
    if (saturate) r = each([](T v) { return v > 0 ? std::min(v, T{1}) : T{0}; }, r);
    w.put(to, m, r);
  };
}

template <class T>
Run add(Source& s) {
  return arithmetic<T, 2>(s, [](T x, T y, T) { return x + y; });
}
// .D2 halves the product, .M2 doubles it, and so on.
template <class T>
Run multiply(Source& s) {
  T factor = 1;
  const std::pair<const char*, double> factors[] = {{"D2", 0.5}, {"D4", 0.25}, {"D8", 0.125},
                                                    {"M2", 2.0}, {"M4", 4.0},  {"M8", 8.0}};
  for (const auto& [name, value] : factors) factor = s.has(name) ? T(value) : factor;
  return arithmetic<T, 2>(s, [factor](T x, T y, T) { return x * y * factor; });
}
template <class T>
Run fused(Source& s) {
  return arithmetic<T, 3>(s, [](T x, T y, T z) { return std::fma(x, y, z); });
}

// Comparisons that hold for NaN, too, are those from kUnordered on.
constexpr int kNumbers = 6, kNotNumbers = 7, kUnordered = 8, kMaximum = 14;

int comparison(Source& s) {
  return s.one_of(
      {"EQ", "NE", "LT", "LE", "GT", "GE", "NUM", "NAN", "EQU", "NEU", "LTU", "LEU", "GTU", "GEU", "MAX", "MIN"});
}

template <class T>
bool compare_reals(int how, T x, T y) {
  const bool unordered = std::isnan(x) || std::isnan(y);
  if (how == kNumbers || how == kNotNumbers) return unordered == (how == kNotNumbers);
  return unordered ? how >= kUnordered : compare_integers(how % kUnordered, x, y);
}

template <class T>
Run setp(Source& s) {
  const int how = comparison(s), combine = s.one_of({"AND", "OR", "XOR"});
  const bool flush = s.has("FTZ");
  const Operand to = s.at(0), other = s.at(1), a = s.at(2), b = s.at(3), with = s.at(4);
  return [=](Warp& w, Mask m) {
    auto x = read<T>(w, a), y = read<T>(w, b);
    if (flush) x = each(flushed<T>, x), y = each(flushed<T>, y);
    if (how >= kMaximum) {  // whether a is the larger or the smaller one, and whether both are NaN
      const auto first = [&](T p, T q) { return std::isnan(q) || (how == kMaximum ? p > q : p < q); };
      w.put(to, m, where(first, x, y));
      w.put(other, m, where([](T p, T q) { return std::isnan(p) && std::isnan(q); }, x, y));
      return;
    }
    const Mask yes = where([&](T p, T q) { return compare_reals(how, p, q); }, x, y), given = w.mask(with);
    w.put(to, m, combined(combine, yes, given));
    w.put(other, m, combined(combine, ~yes, given));
  };
}

Run fset(Source& s) {
  if (!s.has("BF")) throw Fault("unknown form of opcode FSET");
  const int how = comparison(s), combine = s.one_of({"AND", "OR", "XOR"});
  return apply<float, float, bool>(s, [=](float x, float y, bool with) {
    return combined(combine, compare_reals(how, x, y), with) & 1 ? 1.0f : 0.0f;
  });
}

Run fsel(Source& s) {
  return apply<float, float, bool>(s, [](float x, float y, bool first) { return bits<uint32_t>(first ? x : y); });
}

Run fmnmx(Source& s) {
  const bool keeps_nan = s.has("NAN");
  return apply<float, float, bool>(s, [=](float x, float y, bool smaller) {
    if (std::isnan(x) || std::isnan(y)) return std::isnan(x) == keeps_nan ? x : y;
    const bool less = x < y || (x == y && std::signbit(x));
    return less == smaller ? x : y;
  });
}

Run mufu(Source& s) {
  const int what = s.one_of({"RCP64H", "RSQ64H", "EX2", "RCP", "RSQ", "LG2", "SQRT"});
  if (what < 2) {  // of the upper half of a double
    return apply<float>(s, [=](float x) {
      const double wide = bits<double>(join(0, bits<uint32_t>(x)));
      return low(bits<uint64_t>(1 / (what == 0 ? wide : std::sqrt(wide))) >> 32);
    });
  }
  return apply<float>(s, [=](float narrow) {
    const double x = flushed(narrow);
    const double y = what == 2   ? std::exp2(x)
                     : what == 3 ? 1 / x
                     : what == 4 ? 1 / std::sqrt(x)
                     : what == 5 ? std::log2(x)
                                 : std::sqrt(x);
    return flushed(static_cast<float>(y));
  });
}

// Whether a quotient a / b needs the slow path.
Run fchk(Source& s) {
  return apply<float, float>(s, [](float x, float y) {
    const int p = bits<uint32_t>(x) >> 23 & 255, q = bits<uint32_t>(y) >> 23 & 255;
    return p == 255 || q == 255 || q == 0 || p < 24 || q > 252 || std::abs(p - q) >= 126;
  });
}

// ---- conversions
uint32_t half_bits(float x) { return bits<uint16_t>(Half(x)); }
uint32_t bfloat16_bits(float x) { return bits<uint16_t>(BFloat16(x)); }

Run f2f(Source& s) {
  const std::string to = s.next(), from = s.next();
  if (to == "F32" && from == "F64") return apply<double>(s, [](double x) { return static_cast<float>(x); });
  if (to == "F64" && from == "F32") return apply<float>(s, [](float x) { return double{x}; });
  if (to == "F16" && from == "F32") return apply<float>(s, half_bits);
  if (to == "BF16" && from == "F32") return apply<float>(s, bfloat16_bits);
  throw Fault("unknown form of opcode F2F");
}

Run f2fp(Source& s) {
  const auto narrow = s.one_of({"F16", "BF16"}) == 0 ? half_bits : bfloat16_bits;
  if (!s.has("F32") || !s.has("PACK_AB")) throw Fault("unknown form of opcode F2FP");
  return apply<float, float>(s, [=](float x, float y) { return narrow(x) << 16 | narrow(y); });
}

Run hadd2(Source& s) {
  const Operand to = s.at(0), zero = s.at(1), a = s.at(2);
  if (!s.has("F32") || zero.index != kRZ || !zero.negative) throw Fault("unknown form of opcode HADD2");
  const uint32_t flip = a.negative ? 1u << 15 : 0;
  return [=](Warp& w, Mask m) {
    w.put(to, m,
          each([&](uint32_t x) { return float{bits<Half>(static_cast<uint16_t>(x >> a.half ^ flip))}; }, w.raw(a)));
  };
}

// Zeros times zeros and two halves: a way to set a register.
Run hfma2(Source& s) {
  s.has("MMA");
  if (s.at(1).index != kRZ || s.at(2).index != kRZ) throw Fault("unknown form of opcode HFMA2");
  const Operand to = s.at(0);
  const uint32_t immediate = s.immediate;
  return [=](Warp& w, Mask m) { w.put(to, m, each([&](uint32_t) { return immediate; }, Vec<uint32_t>{})); };
}

Run i2f(Source& s) {
  s.has("F32");
  const bool wide = s.has("F64");
  const int from = s.one_of({"", "S32", "U32", "S64", "U64"}), mode = rounding(s);
  const Operand to = s.at(0), a = s.at(1);
  return [=](Warp& w, Mask m) {
    const auto exact = [&](uint64_t x) -> long double {
      if (from == 4) return x;
      if (from == 3) return static_cast<int64_t>(x);
      if (from == 2) return low(x);
      return static_cast<int32_t>(low(x));
    };
    const auto x = from > 2 ? w.longs(a) : each([](uint32_t v) { return uint64_t{v}; }, w.words(a));
    if (wide) return w.put(to, m, rounded(mode, [&](uint64_t v) { return static_cast<double>(exact(v)); }, x));
    w.put(to, m, rounded(mode, [&](uint64_t v) { return static_cast<float>(exact(v)); }, x));
  };
}

// Numbers beyond the type's give its nearest one.
template <class T>
Run to_integer(Source& s, int width, bool is_signed, bool flush) {
  const __int128 least = is_signed ? -(__int128{1} << (width - 1)) : 0;
  const __int128 most = (__int128{1} << (width - is_signed)) - 1;
  const uint64_t of_nan = sizeof(T) == 8 || width == 64 ? uint64_t{1} << (width - 1) : 0;
  const auto truncated = [=](T x) {
    if (std::isnan(x)) return of_nan;
    const __int128 near = static_cast<__int128>(std::clamp<T>(flush ? flushed(x) : x, -0x1p100, 0x1p100));
    return static_cast<uint64_t>(std::clamp(near, least, most));
  };
  if (width == 64) return apply<T>(s, truncated);
  return apply<T>(s, [=](T x) { return low(truncated(x)); });
}

Run f2i(Source& s) {
  const bool flush = s.has("FTZ"), wide = s.has("F64");
  const int type = s.one_of({"S32", "U32", "S64", "U64"}), width = type > 1 ? 64 : 32;
  s.has("NTZ");
  if (!s.has("TRUNC")) throw Fault("unknown form of opcode F2I");
  return wide ? to_integer<double>(s, width, type % 2 == 0, flush) : to_integer<float>(s, width, type % 2 == 0, flush);
}

// ---- moves
Run r2ur(Source& s) {
  const Operand to = s.at(0), a = s.at(1);
  return [=](Warp& w, Mask m) {
    const auto x = w.words(a);
    w.uniforms[to.index] = x[__builtin_ctz(m)];
  };
}

Run s2r(Source& s) {
  const Operand to = s.at(0);
  const std::string what = s.at(1).name;
  const bool thread = what == "SR_TID.X", block = what == "SR_CTAID.X", lane = what == "SR_LANEID";
  for (const char* zero : {"SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId"}) {
    if (what == zero) return [=](Warp& w, Mask m) { w.put(to, m, Vec<uint32_t>{}); };
  }
  if (!thread && !block && !lane) throw Fault("unknown register " + what);
  return [=](Warp& w, Mask m) {
    Vec<uint32_t> x;
    for (int l = 0; l < kLanes; ++l) x[l] = block ? w.block.index : thread ? w.number * kLanes + l : l;
    w.put(to, m, x);
  };
}

Run cs2r(Source& s) {
  const bool narrow = s.has("32");
  const Operand to = s.at(0);
  if (s.at(1).name != "SRZ") throw Fault("unknown register " + s.at(1).name);
  return [=](Warp& w, Mask m) {
    if (narrow) return w.put(to, m, Vec<uint32_t>{});
    w.put(to, m, Vec<uint64_t>{});
  };
}

Run p2r(Source& s) {
  const Operand to = s.at(0), a = s.at(2);
  const uint32_t which = static_cast<uint32_t>(s.at(3).value);
  return [=](Warp& w, Mask m) {
    auto x = each([&](uint32_t v) { return v & ~which; }, w.words(a));
    for (int i = 0; i < kPT; ++i) {
      if (!(which >> i & 1)) continue;
      for (int l = 0; l < kLanes; ++l) x[l] |= (w.predicates[i] >> l & 1) << i;
    }
    w.put(to, m, x);
  };
}

Run r2p(Source& s) {
  const Operand a = s.at(1);
  const uint32_t which = static_cast<uint32_t>(s.at(2).value);
  return [=](Warp& w, Mask m) {
    const auto x = w.words(a);
    Operand to;
    to.kind = Operand::kPredicate;
    for (to.index = 0; to.index < kPT; ++to.index) {
      if (which >> to.index & 1) w.put(to, m, where([&](uint32_t v) { return (v >> to.index & 1) != 0; }, x));
    }
  };
}

// ---- between lanes
Run shfl(Source& s) {
  const int how = s.one_of({"IDX", "UP", "DOWN", "BFLY"});
  const Operand inside = s.at(0), to = s.at(1), a = s.at(2), by = s.at(3), limits = s.at(4);
  return [=](Warp& w, Mask m) {
    const auto x = w.words(a), delta = w.words(by), limit = w.words(limits);
    Vec<uint32_t> y = x;
    Mask found = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(m >> lane & 1)) continue;
      const int segment = limit[lane] >> 8 & 31, clamp = limit[lane] & 31, d = delta[lane] & 31;
      const int first = lane & segment, last = first | (clamp & ~segment);
      const int source = how == 0 ? first | (d & ~segment) : how == 1 ? lane - d : how == 2 ? lane + d : lane ^ d;
      if (how == 1 ? source < last : source > last) continue;
      if (!(m >> source & 1)) {
        throw Fault(w.thread(lane) + " reads lane " + std::to_string(source) + ", which takes no part in it");
      }
      y[lane] = x[source];
      found |= 1u << lane;
    }
    w.put(to, m, y);
    w.put(inside, m, found);
  };
}

Run vote(Source& s) {
  const bool any = s.one_of({"ANY", "ALL"}) == 0;
  const bool counts = s.at(0).kind == Operand::kRegister || s.at(0).kind == Operand::kUniform;
  const Operand ballot = counts ? s.at(0) : nothing(), to = s.at(counts), p = s.at(counts + 1);
  return [=](Warp& w, Mask m) {
    const Mask yes = w.mask(p) & m;
    w.put(ballot, m, each([&](uint32_t) { return yes; }, Vec<uint32_t>{}));
    w.put(to, m, (any ? yes != 0 : yes == m) ? kAllLanes : 0);
  };
}

// ---- memory
struct Width {
  int bytes;
  bool is_signed;
};

Width width(Source& s) {
  for (const char* hint : {"E", "CONSTANT", "STRONG", "GPU", "LU"}) s.has(hint);  // nothing that changes a number
  constexpr Width widths[] = {{4, false}, {8, false}, {16, false}, {1, false}, {1, true}, {2, false}, {2, true}};
  return widths[s.one_of({"", "64", "128", "U8", "S8", "U16", "S16"})];
}

uint32_t extended(uint32_t x, Width width) {
  const int unused = 32 - 8 * std::min(width.bytes, 4);
  return width.is_signed ? static_cast<uint32_t>(static_cast<int32_t>(x << unused) >> unused) : x;
}

template <Space kSpace>
Run load(Source& s) {
  const Width as = width(s);
  const Operand to = s.at(0), from = s.at(1);
  if (kSpace == Space::kGlobal) s.loads = as.bytes;
  return [=](Warp& w, Mask m) {
    Vec<uint32_t> x[4];
    w.load(kSpace, from, m, as.bytes, x);
    if (as.is_signed) x[0] = each([&](uint32_t v) { return extended(v, as); }, x[0]);
    for (int i = 0; i < (as.bytes + 3) / 4; ++i) w.put(to, m, x[i], i);
  };
}

template <Space kSpace>
Run store(Source& s) {
  const int bytes = width(s).bytes;
  const Operand to = s.at(0), from = s.at(1);
  if (from.kind != Operand::kRegister) throw Fault("unknown operand " + from.name);
  return [=](Warp& w, Mask m) {
    Vec<uint32_t> x[4];
    for (int i = 0; i < (bytes + 3) / 4; ++i) x[i] = w.raw(from, i);
    w.store(kSpace, to, m, bytes, x);
  };
}

Run atoms(Source& s) {
  using F = uint32_t (*)(uint32_t, uint32_t);
  const F functions[] = {[](uint32_t x, uint32_t y) { return x + y; }, [](uint32_t x, uint32_t y) { return x | y; },
                         [](uint32_t x, uint32_t y) { return x & y; }, [](uint32_t x, uint32_t y) { return x ^ y; },
                         [](uint32_t, uint32_t y) { return y; }};
  const F f = functions[s.one_of({"ADD", "OR", "AND", "XOR", "EXCH"})];
  const Operand to = s.at(0), where = s.at(1), a = s.at(2);
  return [=](Warp& w, Mask m) { w.put(to, m, w.update_shared(where, m, w.words(a), f)); };
}

Run ldc(Source& s) {
  const Width as = width(s);
  const Operand to = s.at(0), from = s.at(1);
  if (from.kind != Operand::kConstant) throw Fault("unknown operand " + from.name);
  return [=](Warp& w, Mask m) {
    const auto address = w.addresses(from);
    Vec<uint64_t> x = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      if (m >> lane & 1 || to.kind == Operand::kUniform) x[lane] = w.constant(address[lane], as.bytes);
    }
    if (as.bytes == 8) return w.put(to, m, x);
    w.put(to, m, each([&](uint64_t v) { return extended(low(v), as); }, x));
  };
}

Run nothing_done(Source&) {
  return [](Warp&, Mask) {};
}

// ---- all of them
struct Opcode {
  const char* name;
  Class kind;
  Run (*make)(Source&);
};

// clang-format off
const Opcode kOpcodes[] = {
    {"FADD", Class::kFloat, add<float>}, {"FMUL", Class::kFloat, multiply<float>},
    {"FFMA", Class::kFloat, fused<float>}, {"FSETP", Class::kFloat, setp<float>}, {"FSET", Class::kFloat, fset},
    {"FSEL", Class::kFloat, fsel}, {"FMNMX", Class::kFloat, fmnmx}, {"FCHK", Class::kFloat, fchk},
    {"DADD", Class::kDouble, add<double>}, {"DMUL", Class::kDouble, multiply<double>},
    {"DFMA", Class::kDouble, fused<double>}, {"DSETP", Class::kDouble, setp<double>},
    {"MUFU", Class::kMufu, mufu},
    {"IADD3", Class::kInteger, iadd3}, {"IMAD", Class::kInteger, imad}, {"LEA", Class::kInteger, lea},
    {"SHF", Class::kInteger, shf}, {"LOP3", Class::kInteger, lop3}, {"PLOP3", Class::kInteger, plop3},
    {"PRMT", Class::kInteger, prmt}, {"SEL", Class::kInteger, sel}, {"ISETP", Class::kInteger, isetp},
    {"VIADD", Class::kInteger, viadd}, {"VIMNMX", Class::kInteger, vimnmx}, {"VIMNMX3", Class::kInteger, vimnmx3},
    {"VIADDMNMX", Class::kInteger, viaddmnmx}, {"IABS", Class::kInteger, iabs},
    {"F2F", Class::kConvert, f2f}, {"F2FP", Class::kConvert, f2fp}, {"F2I", Class::kConvert, f2i},
    {"I2F", Class::kConvert, i2f}, {"I2FP", Class::kConvert, i2f}, {"HADD2", Class::kConvert, hadd2},
    {"HFMA2", Class::kMove, hfma2}, {"MOV", Class::kMove, mov}, {"R2UR", Class::kMove, r2ur},
    {"S2R", Class::kMove, s2r}, {"S2UR", Class::kMove, s2r}, {"CS2R", Class::kMove, cs2r}, {"P2R", Class::kMove, p2r},
    {"R2P", Class::kMove, r2p},
    {"SHFL", Class::kWarp, shfl}, {"VOTE", Class::kWarp, vote}, {"VOTEU", Class::kWarp, vote},
    {"LDG", Class::kGlobal, load<Space::kGlobal>}, {"STG", Class::kGlobal, store<Space::kGlobal>},
    {"LDS", Class::kShared, load<Space::kShared>}, {"STS", Class::kShared, store<Space::kShared>},
    {"ATOMS", Class::kShared, atoms},
    {"LDL", Class::kLocal, load<Space::kLocal>}, {"STL", Class::kLocal, store<Space::kLocal>},
    {"LDC", Class::kConstant, ldc},
    {"NOP", Class::kControl, nothing_done}, {"YIELD", Class::kControl, nothing_done},
    {"ENDCOLLECTIVE", Class::kControl, nothing_done},
};
// clang-format on

const std::unordered_map<std::string, Flow> kFlows = {
    {"BRA", Flow::kBranch},  {"CALL", Flow::kBranch},       {"RET", Flow::kReturn},
    {"EXIT", Flow::kExit},   {"BSSY", Flow::kPush},         {"BSYNC", Flow::kJoin},
    {"BREAK", Flow::kBreak}, {"WARPSYNC", Flow::kWarpSync}, {"BAR", Flow::kBarrier},
};

void understand_flow(Source& s, Instruction& to) {
  for (const char* how : {"REL", "NOINC", "NODEC", "U", "SYNC", "DEFER_BLOCKING"}) s.has(how);
  to.condition = to.guard;
  const size_t count = s.operands.size();
  switch (to.flow) {
    case Flow::kBranch:
      if (s.has("DIV")) {
        to.flow = Flow::kApart;
        to.condition = s.at(0);
      } else if (count > 1) {
        to.condition = s.at(0);
      }
      to.target = static_cast<uint32_t>(s.at(count - 1).value);
      break;
    case Flow::kReturn: to.condition = s.at(0); break;
    case Flow::kExit:
      if (count > 0) to.condition = s.at(0);
      break;
    case Flow::kPush:
    case Flow::kJoin:
    case Flow::kBreak: to.number = s.at(0).index; break;
    case Flow::kWarpSync:
      if (s.has("COLLECTIVE")) {  // for lanes that BRA.DIV has found apart
        to.flow = Flow::kNext;
        to.run = [](Warp&, Mask) { throw Fault("a warp collective of lanes that are apart"); };
      } else if (!s.has("ALL")) {
        throw Fault("unknown form of opcode WARPSYNC");
      }
      break;
    default:
      if (s.at(0).value != 0) throw Fault("unknown barrier " + s.at(0).name);
  }
}

}  // namespace

void understand(Source& source, Instruction& instruction) {
  const auto flow = kFlows.find(source.name);
  if (flow != kFlows.end()) {
    instruction.flow = flow->second;
    understand_flow(source, instruction);
  } else {
    const auto named = [](const char* name) {
      return std::find_if(std::begin(kOpcodes), std::end(kOpcodes),
                          [&](const Opcode& o) { return !strcmp(o.name, name); });
    };
    auto opcode = named(source.name.c_str());
    if (opcode == std::end(kOpcodes) && source.name[0] == 'U') opcode = named(source.name.c_str() + 1);
    if (opcode == std::end(kOpcodes)) throw Fault("unknown opcode " + source.name);
    instruction.kind = opcode->kind;
    instruction.run = opcode->make(source);
    instruction.loads = source.loads;
  }
  if (!source.unread.empty()) throw Fault("unknown modifier " + source.unread[0] + " of " + source.name);
}

}  // namespace sass
