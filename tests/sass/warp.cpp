// Runs warps. Lanes that are together share a group; where there are several the one that is furthest behind goes on,
// and groups that meet become one. Convergence barriers are the machine's own: BSSY names their members, BSYNC waits
// for them, BREAK lets some go. Warps of a block take turns at its barriers, blocks run one after another: the same
// order, and the same counts, each time.
//
// A wait for global memory is an instruction whose encoding waits for a scoreboard that a load has taken since the last
// such wait; it is counted as one round trip, at whose end all earlier loads are there.
#include <algorithm>
#include <cmath>

#include "machine.h"

namespace sass {
namespace {

constexpr int kWarpSync = kBarriers;  // lanes at WARPSYNC wait as at one more convergence barrier
constexpr int kStack = 0x28;  // the end of the stack, in the constant bank; the sizes of blocks and grid are at 0

Vec<uint32_t> broadcast(uint32_t x) {
  Vec<uint32_t> y;
  for (uint32_t& v : y.x) v = x;
  return y;
}

// One block of each of `ran` equal parts of the grid, at another place in each.
uint32_t spread(uint32_t i, uint32_t ran, uint32_t blocks) {
  const double place = 0.6180339887498949 * (i + 1);
  return static_cast<uint32_t>((i + place - std::floor(place)) * blocks / ran);
}

}  // namespace

// ---- operands
Vec<uint64_t> Warp::addresses(const Operand& x) const {
  const uint64_t base = x.uniform == kURZ ? 0 : uniforms[x.uniform];
  Vec<uint64_t> all;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint64_t at = registers_[x.index][lane];
    if (x.wide && x.index != kRZ) at |= uint64_t{registers_[x.index + 1][lane]} << 32;
    at += base + x.value;
    all[lane] = x.wide ? at : static_cast<uint32_t>(at);
  }
  return all;
}

// Its bits, without its sign; of a register that many after it.
Vec<uint32_t> Warp::raw(const Operand& x, int next) const {
  switch (x.kind) {
    case Operand::kRegister: return registers_[x.index == kRZ ? kRZ : x.index + next];
    case Operand::kUniform: return broadcast(x.index == kURZ ? 0 : uniforms[x.index + next]);
    case Operand::kImmediate: return broadcast(next ? 0 : static_cast<uint32_t>(x.value));
    case Operand::kConstant:
      if (x.index != kRZ || x.uniform != kURZ) break;
      return broadcast(static_cast<uint32_t>(constant(x.value + 4 * next, 4)));
    default: break;
  }
  throw Fault("unknown operand " + x.name);
}

Vec<uint64_t> Warp::raw_longs(const Operand& x) const {
  return each([](uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; }, raw(x), raw(x, 1));
}

Vec<uint32_t> Warp::words(const Operand& x) const {
  if (x.absolute) throw Fault("unknown operand " + x.name);
  const Vec<uint32_t> bits = raw(x);
  if (x.negative) return each([](uint32_t v) { return 0 - v; }, bits);
  return x.inverted ? each([](uint32_t v) { return ~v; }, bits) : bits;
}

Vec<uint64_t> Warp::longs(const Operand& x) const {
  if (x.negative || x.inverted || x.absolute) throw Fault("unknown operand " + x.name);
  return raw_longs(x);
}

Vec<float> Warp::floats(const Operand& x) const {
  const uint32_t keep = x.absolute ? ~0u >> 1 : ~0u, flip = x.negative ? 1u << 31 : 0;
  return each([&](uint32_t v) { return bits<float>((v & keep) ^ flip); }, raw(x));
}

Vec<double> Warp::doubles(const Operand& x) const {
  const int shift = x.kind == Operand::kImmediate ? 32 : 0;  // an immediate has the upper half
  const uint64_t sign = uint64_t{1} << 63, keep = x.absolute ? ~sign : ~uint64_t{0}, flip = x.negative ? sign : 0;
  return each([&](uint64_t v) { return bits<double>((v << shift & keep) ^ flip); }, raw_longs(x));
}

Mask Warp::mask(const Operand& x) const {
  Mask lanes;
  if (x.kind == Operand::kPredicate) {
    lanes = predicates[x.index];
  } else if (x.kind == Operand::kUniformPredicate) {
    lanes = uniform_predicates[x.index] ? kAllLanes : 0;
  } else {
    throw Fault("unknown predicate " + x.name);
  }
  return x.inverted ? ~lanes : lanes;
}

void Warp::put(const Operand& to, Mask lanes, const Vec<uint32_t>& x, int next) {
  if (to.kind == Operand::kUniform) {
    if (to.index != kURZ) uniforms[to.index + next] = x[0];
  } else if (to.kind != Operand::kRegister) {
    throw Fault("unknown result " + to.name);
  } else if (to.index != kRZ) {
    Vec<uint32_t>& r = registers_[to.index + next];
    if (lanes == kAllLanes) {
      r = x;
      return;
    }
    for (int lane = 0; lane < kLanes; ++lane) r[lane] = lanes >> lane & 1 ? x[lane] : r[lane];
  }
}

void Warp::put(const Operand& to, Mask lanes, const Vec<float>& x) { put(to, lanes, each(bits<uint32_t, float>, x)); }

void Warp::put(const Operand& to, Mask lanes, const Vec<uint64_t>& x) {
  put(to, lanes, each([](uint64_t v) { return static_cast<uint32_t>(v); }, x), 0);
  put(to, lanes, each([](uint64_t v) { return static_cast<uint32_t>(v >> 32); }, x), 1);
}

void Warp::put(const Operand& to, Mask lanes, const Vec<double>& x) { put(to, lanes, each(bits<uint64_t, double>, x)); }

void Warp::put(const Operand& to, Mask lanes, const Vec<bool>& x) {
  Mask bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= Mask{x[lane]} << lane;
  put(to, lanes, bits);
}

void Warp::put(const Operand& to, Mask lanes, Mask x) {
  if (to.index == kPT) return;
  if (to.kind == Operand::kPredicate) {
    predicates[to.index] = (predicates[to.index] & ~lanes) | (x & lanes);
  } else if (to.kind == Operand::kUniformPredicate) {
    uniform_predicates[to.index] = x & 1;
  } else {
    throw Fault("unknown result " + to.name);
  }
}

// ---- control flow
void Warp::start() {
  const int left = static_cast<int>(block.launch.threads) - number * kLanes;
  alive = left >= kLanes ? kAllLanes : (Mask{1} << left) - 1;
  memset(registers_, 0, sizeof(registers_));
  memset(predicates, 0, sizeof(predicates));
  memset(uniforms, 0, sizeof(uniforms));
  memset(uniform_predicates, 0, sizeof(uniform_predicates));
  memset(members_, 0, sizeof(members_));
  memset(waiting_, 0, sizeof(waiting_));
  memset(outstanding_, 0, sizeof(outstanding_));
  memset(busy_, 0, sizeof(busy_));
  far_ = false;
  predicates[kPT] = kAllLanes;
  uniform_predicates[kPT] = true;
  groups_ = {{0, alive}};
  at_barrier_ = false;
  trips_ = 0;
  local_.clear();
}

// Brings the group to the end that goes on next; whether there is one.
bool Warp::pick() {
  if (groups_.size() < 2) return !groups_.empty();
  Group next{groups_[0].at, 0};
  for (const Group& group : groups_) next.at = std::min(next.at, group.at);
  const auto meets = [&](const Group& group) {
    if (group.at == next.at) next.lanes |= group.lanes;
    return group.at == next.at;
  };
  groups_.erase(std::remove_if(groups_.begin(), groups_.end(), meets), groups_.end());
  groups_.push_back(next);
  return true;
}

void Warp::run() {
  while (!at_barrier_ && !ended()) {
    if (!pick()) throw Fault("lanes wait for each other for ever");
    at_ = groups_.back().at;
    step();
  }
}

void Warp::wait(const Instruction& i) {
  int in_flight = 0;
  bool waits = false, pauses = false;
  for (int s = 0; s < kScoreboards; ++s) {
    in_flight += outstanding_[s];
    waits |= (i.waits >> s & 1) && outstanding_[s] > 0;
    pauses |= (i.waits >> s & 1) && busy_[s];
    busy_[s] = busy_[s] && !(i.waits >> s & 1);
  }
  if (!waits) {
    block.counts.pauses += pauses;
    return;
  }
  ++block.counts.trips;
  block.counts.far += far_;
  far_ = false;
  block.counts.most_trips = std::max(block.counts.most_trips, ++trips_);
  block.counts.in_flight += in_flight;
  memset(outstanding_, 0, sizeof(outstanding_));
}

// The lanes of the last group that go elsewhere leave it.
void Warp::leave(Mask lanes) {
  Group& group = groups_.back();
  group.lanes &= ~lanes;
  group.at += kStep;
  if (!group.lanes) groups_.pop_back();
}

void Warp::step() {
  const std::vector<Instruction>& code = block.launch.kernel->code;
  if (at_ / kStep >= code.size()) throw Fault("runs beyond its code");
  const Instruction& i = code[at_ / kStep];
  const Mask group = groups_.back().lanes, lanes = group & mask(i.guard);
  ++block.counts.instructions[static_cast<int>(i.kind)];
  block.counts.clocks += i.clocks;
  wait(i);
  switch (i.flow) {
    case Flow::kNext:
      if (lanes) {
        i.run(*this, lanes);
        if (i.sets < kScoreboards) {
          outstanding_[i.sets] += i.loads;
          busy_[i.sets] |= i.loads == 0;
        }
      }
      groups_.back().at += kStep;
      return;
    case Flow::kBranch: {
      const Mask taken = lanes & mask(i.condition);
      leave(taken);
      if (taken) groups_.push_back({i.target, taken});
      return;
    }
    case Flow::kApart:  // to code for lanes that are not together
      if (uniforms[i.condition.index] & alive & ~group) throw Fault("a warp collective of lanes that are apart");
      return leave(0);
    case Flow::kReturn: {
      const Vec<uint32_t> to = raw(i.condition);
      leave(lanes);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (lanes >> lane & 1) groups_.push_back({to[lane], 1u << lane});
      }
      return;
    }
    case Flow::kExit: {
      const Mask ended = lanes & mask(i.condition);
      alive &= ~ended;
      leave(ended);
      for (int b = 0; b <= kBarriers; ++b) release(b);
      return;
    }
    case Flow::kPush: members_[i.number] |= group; return leave(0);
    case Flow::kBreak:
      members_[i.number] &= ~lanes;
      leave(0);
      return release(i.number);
    case Flow::kJoin: return arrive(i.number, lanes);
    case Flow::kWarpSync: members_[kWarpSync] = alive; return arrive(kWarpSync, lanes);
    case Flow::kBarrier:
      if (lanes != alive) throw Fault("a barrier of the block that only some lanes of a warp reach");
      leave(0);
      at_barrier_ = true;
  }
}

void Warp::arrive(int barrier, Mask lanes) {
  if (waiting_[barrier] && wait_at_[barrier] != at_) throw Fault("lanes wait for each other at different places");
  leave(lanes);
  waiting_[barrier] |= lanes;
  wait_at_[barrier] = at_;
  release(barrier);
}

// Lets the lanes go on that wait at a convergence barrier, if they are all that it waits for.
void Warp::release(int barrier) {
  if (!waiting_[barrier] || (members_[barrier] & alive & ~waiting_[barrier])) return;
  groups_.push_back({wait_at_[barrier] + kStep, waiting_[barrier]});
  members_[barrier] = waiting_[barrier] = 0;
}

// ---- blocks
Block::Block(const Launch& launch, Counts& counts) : launch(launch), counts(counts) {
  const int warps = static_cast<int>((launch.threads + kLanes - 1) / kLanes);
  for (int i = 0; i < warps; ++i) warps_.push_back(std::make_unique<Warp>(*this, i));
}

void Block::run(uint32_t block) {
  index = block;
  shared.assign(shared_end(launch), 0xff);
  for (auto& warp : warps_) warp->start();
  Warp* running = nullptr;
  try {
    for (;;) {
      Warp* first = nullptr;
      for (auto& warp : warps_) {
        running = warp.get();
        warp->run();
        if (warp->ended()) continue;
        if (first && first->at() != warp->at()) throw Fault("warps wait at different barriers");
        first = warp.get();
      }
      if (!first) break;
      ++counts.barriers;
      for (auto& warp : warps_) warp->leave_barrier();
    }
  } catch (const Fault& fault) {
    throw Fault(std::string(fault.what()) + "\n  at " + hex(running->at()) + ": " +
                launch.kernel->code[running->at() / kStep].text + "\n  in " + "warp " +
                std::to_string(running->number) + " of block " + std::to_string(index));
  }
  counts.warps += warps_.size();
}

void Counts::add(const Counts& launch, int64_t blocks, int64_t ran) {
  const auto more = [&](int64_t& to, int64_t from) { to += (from * blocks + ran / 2) / ran; };
  launches += launch.launches;
  most_trips = std::max(most_trips, launch.most_trips);
  more(warps, launch.warps);
  more(barriers, launch.barriers);
  for (int i = 0; i < kClasses; ++i) more(instructions[i], launch.instructions[i]);
  for (Traffic Counts::* way : {&Counts::loads, &Counts::stores}) {
    more((this->*way).requests, (launch.*way).requests);
    more((this->*way).sectors, (launch.*way).sectors);
    more((this->*way).distinct, (launch.*way).distinct);
  }
  more(trips, launch.trips);
  more(in_flight, launch.in_flight);
  more(far, launch.far);
  more(pauses, launch.pauses);
  more(clocks, launch.clocks);
  more(shared_requests, launch.shared_requests);
  more(conflicts, launch.conflicts);
}

uint32_t most_blocks = 0;

void run(Launch launch, Counts& counts) {
  const uint32_t size[] = {launch.threads, 1, 1, launch.blocks, 1, 1}, stack = kStackEnd;
  memcpy(launch.constants.data(), size, sizeof(size));
  memcpy(launch.constants.data() + kStack, &stack, sizeof(stack));
  Counts own;
  Block block(launch, own);
  const uint32_t ran = most_blocks ? std::min(most_blocks, launch.blocks) : launch.blocks;
  for (uint32_t i = 0; i < ran; ++i) block.run(ran == launch.blocks ? i : spread(i, ran, launch.blocks));
  ++own.launches;
  end_sectors(own);
  counts.add(own, launch.blocks, ran);
}

}  // namespace sass
