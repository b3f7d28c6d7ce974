// A multiprocessor that runs the machine code of sm_90: what the parts of the emulator tell each other.
//
//   decode.cpp   the text that cuobjdump prints -> instructions
//   opcodes.cpp  what each computes, for the 32 lanes of a warp at once
//   memory.cpp   loads and stores: bounds, alignment, sectors and bank conflicts
//   warp.cpp     control flow, convergence, barriers, and the counts of all that is issued
//   runtime.cpp  the CUDA runtime that the host code of csrc/*/cuda.cu is linked against
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace sass {

constexpr int kLanes = 32;
constexpr int kRZ = 255, kURZ = 63, kPT = 7;  // registers and predicates of a fixed value
constexpr int kBarriers = 16;                 // convergence barriers of a warp
constexpr int kScoreboards = 6;
constexpr uint32_t kStep = 16;  // bytes of an instruction

using Mask = uint32_t;  // a bit for each lane
constexpr Mask kAllLanes = ~0u;

// A value in each lane.
template <class T>
struct Vec {
  T x[kLanes];
  T& operator[](int lane) { return x[lane]; }
  const T& operator[](int lane) const { return x[lane]; }
};

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// f of each lane's values.
template <class F, class... T>
auto each(F f, const T&... x) {
  Vec<decltype(f(x[0]...))> y;
  for (int lane = 0; lane < kLanes; ++lane) y[lane] = f(x[lane]...);
  return y;
}

// What a kernel does wrong, or what the emulator does not know.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string hex(uint64_t x);

// ---- code
struct Operand {
  enum Kind { kRegister, kUniform, kPredicate, kUniformPredicate, kConstant, kImmediate, kAddress, kName };
  Kind kind = kName;
  int index = kRZ;                                            // its number; of an address: the register in it
  int uniform = kURZ;                                         // the uniform register in an address
  bool wide = false;                                          // the register in an address is one of a pair
  bool negative = false, absolute = false, inverted = false;  // inverted: ~ of a number, ! of a predicate
  int half = 0;                                               // 16 where .H1_H1 is read, else 0
  int64_t value = 0;                                          // of an immediate: its bits; else the offset
  std::string name;                                           // as it is written
};

enum class Class {
  kFloat,
  kDouble,
  kInteger,
  kMufu,
  kConvert,
  kMove,
  kGlobal,
  kShared,
  kLocal,
  kConstant,
  kWarp,
  kControl
};
constexpr int kClasses = 12;
extern const char* const kClassNames[kClasses];

enum class Flow { kNext, kBranch, kApart, kReturn, kExit, kPush, kJoin, kBreak, kWarpSync, kBarrier };

class Warp;
using Run = std::function<void(Warp&, Mask)>;

struct Instruction {
  std::string text;
  Operand guard;
  uint8_t waits = 0;  // a bit for each scoreboard that has to be free
  int sets = 7;       // the scoreboard that is taken until the result is there; 7: none
  int clocks = 1;     // until the warp may go on, at the earliest
  Class kind = Class::kControl;
  Flow flow = Flow::kNext;
  Operand condition;    // of a branch or an exit, beside the guard
  int number = 0;       // of the barrier
  uint32_t target = 0;  // of a branch
  int loads = 0;        // bytes of global memory, for each lane
  Run run;
};

// An instruction's text, taken apart. Who reads a modifier has to know what it means: `unread` are the others.
struct Source {
  std::string name;
  std::vector<std::string> unread;
  std::vector<Operand> operands;
  uint32_t immediate = 0;  // the bits of the encoding where one lies
  int loads = 0;           // to the instruction

  bool has(const char* modifier);
  std::string next();  // the first of them
  // Which of several modifiers it has; the first, "", stands for none of them.
  int one_of(std::initializer_list<const char*> modifiers);
  const Operand& at(size_t i) const;
  // Leading predicates that are written, from operand `i` on.
  std::vector<Operand> predicates(size_t i) const;
};

// What an opcode is: kind and flow, and, unless it is control flow, what it computes.
void understand(Source& source, Instruction& instruction);

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  uint32_t shared_end = 0;                     // of what it declares
  std::vector<std::array<int, 2>> parameters;  // offset, size
};

// The code of a kernel, from what `cuobjdump -sass` prints of it.
std::vector<Instruction> decode(const std::string& text);

// ---- counts
// Of one kernel; instructions are those of warps.
struct Counts {
  int64_t launches = 0, warps = 0, barriers = 0;
  int64_t instructions[kClasses] = {};
  // Global memory: requests of warps, the 32-byte sectors of each, and the different ones among all of a launch.
  struct Traffic {
    int64_t requests = 0, sectors = 0, distinct = 0;
  } loads, stores;
  // Waits for global memory: of all warps, of the one with most; and the bytes that a lane waits for, of all of them.
  int64_t trips = 0, most_trips = 0, in_flight = 0;
  // Waits that end with a sector which the launch had not read before. Waits for other units, as shared memory, without
  // one for global memory. Clocks that the encoding holds warps back.
  int64_t far = 0, pauses = 0, clocks = 0;
  int64_t shared_requests = 0, conflicts = 0;  // conflicts: wavefronts beyond those that the width needs

  // Those of one launch, of whose blocks only some ran: as if all had done what these did.
  void add(const Counts& launch, int64_t blocks, int64_t ran);
};

// ---- memory
// Global memory is that of the process. Only what was registered may be touched.
void allow(void* begin, size_t bytes);
void forget_all();

// Adds up the different sectors of the launch that ends.
void end_sectors(Counts& counts);

struct Launch {
  const Kernel* kernel;
  uint32_t blocks, threads, dynamic_shared;
  std::vector<uint8_t> constants;  // bank 0
};

// At most so many blocks of a launch run, spread over its grid; 0: all.
extern uint32_t most_blocks;

void run(Launch launch, Counts& counts);

constexpr uint32_t kSharedBegin = 0x400;  // what lies before is the system's
uint32_t shared_end(const Launch& launch);
extern const uint32_t kStackEnd;  // of each lane's local memory

class Block {
 public:
  Block(const Launch& launch, Counts& counts);
  void run(uint32_t index);
  const Launch& launch;
  Counts& counts;
  uint32_t index = 0;
  std::vector<uint8_t> shared;

 private:
  std::vector<std::unique_ptr<Warp>> warps_;
};

class Warp {
 public:
  Warp(Block& block, int number) : block(block), number(number) {}

  void start();
  void run();  // until it waits for its block, or has ended
  bool ended() const { return alive == 0; }
  bool at_barrier() const { return at_barrier_; }
  uint32_t at() const { return at_; }
  void leave_barrier() { at_barrier_ = false; }

  // ---- operands; with their signs
  Vec<uint32_t> raw(const Operand& x, int next = 0) const;
  Vec<uint64_t> raw_longs(const Operand& x) const;
  Vec<uint32_t> words(const Operand& x) const;
  Vec<uint64_t> longs(const Operand& x) const;
  Vec<float> floats(const Operand& x) const;
  Vec<double> doubles(const Operand& x) const;
  Mask mask(const Operand& predicate) const;
  Vec<uint64_t> addresses(const Operand& x) const;
  void put(const Operand& to, Mask lanes, const Vec<uint32_t>& x, int next = 0);
  void put(const Operand& to, Mask lanes, const Vec<float>& x);
  void put(const Operand& to, Mask lanes, const Vec<uint64_t>& x);
  void put(const Operand& to, Mask lanes, const Vec<double>& x);
  void put(const Operand& to, Mask lanes, const Vec<bool>& x);
  void put(const Operand& to, Mask lanes, Mask x);

  // ---- memory: each lane's bytes lie in words[i][lane], from i = 0 on
  enum class Space { kGlobal, kShared, kLocal };
  void load(Space space, const Operand& from, Mask lanes, int bytes, Vec<uint32_t>* words);
  void store(Space space, const Operand& to, Mask lanes, int bytes, const Vec<uint32_t>* words);
  // *at = f(*at, x), lane by lane; the old values.
  Vec<uint32_t> update_shared(const Operand& at, Mask lanes, const Vec<uint32_t>& x, uint32_t (*f)(uint32_t, uint32_t));
  uint64_t constant(uint64_t offset, int bytes) const;

  std::string thread(int lane) const { return "thread " + std::to_string(number * kLanes + lane); }

  Block& block;
  const int number;
  Mask alive = 0;
  Mask predicates[8];
  bool uniform_predicates[8];
  uint32_t uniforms[64];

 private:
  struct Group {  // of lanes that run together
    uint32_t at;
    Mask lanes;
  };

  bool pick();
  void step();
  void leave(Mask lanes);
  void arrive(int barrier, Mask lanes);
  void release(int barrier);
  void wait(const Instruction& instruction);
  uint8_t* place(Space space, uint64_t address, int bytes, int lane, bool write);
  void count(Space space, const Vec<uint64_t>& addresses, Mask lanes, int bytes, bool write);

  Vec<uint32_t> registers_[256];
  std::vector<Group> groups_;
  Mask members_[kBarriers + 1];  // of convergence barriers; the last is WARPSYNC's
  Mask waiting_[kBarriers + 1];
  uint32_t wait_at_[kBarriers + 1];
  uint32_t at_ = 0;
  bool at_barrier_ = false;
  int outstanding_[kScoreboards];  // bytes of a lane's global loads
  bool busy_[kScoreboards];        // with something else
  bool far_ = false;               // a sector on its way is one that the launch has not read before
  int64_t trips_ = 0;
  std::vector<uint8_t> local_;  // of each lane in turn
};

}  // namespace sass
