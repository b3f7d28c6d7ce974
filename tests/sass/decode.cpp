// Reads what `cuobjdump -sass` prints of a kernel: a line for each instruction with its address, its text and its
// encoding, of which a second line has the upper half. Numbers that are printed in decimal are taken from the encoding,
// as are the scoreboards, which the text does not show.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace sass {
namespace {

[[noreturn]] void unknown(const std::string& what) { throw Fault("unknown operand " + what); }

bool starts(const std::string& text, const char* prefix) { return text.compare(0, strlen(prefix), prefix) == 0; }

// Takes a leading or a trailing part away, if it is there.
bool take(std::string& text, const char* prefix) {
  if (!starts(text, prefix)) return false;
  text.erase(0, strlen(prefix));
  return true;
}

bool take_end(std::string& text, const std::string& suffix) {
  const bool ends = text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
  if (ends) text.resize(text.size() - suffix.size());
  return ends;
}

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t"), end = text.find_last_not_of(" \t");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

// "R12" -> 12 for the prefix "R" and the name "RZ" of number `last`; -1 for what is none.
int number_of(const std::string& text, const char* prefix, const char* last_name, int last) {
  if (text == last_name) return last;
  const size_t digits = strlen(prefix);
  if (!starts(text, prefix) || text.size() == digits) return -1;
  if (text.find_first_not_of("0123456789", digits) != std::string::npos) return -1;
  const int number = atoi(text.c_str() + digits);
  return number < last ? number : -1;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  int depth = 0;
  std::string part;
  for (char c : text + separator) {
    depth += (c == '[') - (c == ']');
    if (c == separator && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  return parts;
}

// "R2.64+UR4+0x10"
void parse_address(const std::string& text, Operand& to) {
  for (std::string part : split(text, '+')) {
    const bool wide = take_end(part, ".64");
    int number;
    if (starts(part, "0x") || starts(part, "-0x")) {
      to.value = strtoll(part.c_str(), nullptr, 16);
    } else if ((number = number_of(part, "R", "RZ", kRZ)) >= 0) {
      to.index = number;
      to.wide = wide;
    } else if ((number = number_of(part, "UR", "URZ", kURZ)) >= 0 && !wide) {
      to.uniform = number;
    } else {
      unknown("[" + text + "]");
    }
  }
  if (to.wide && to.uniform != kURZ) unknown("[" + text + "]");
}

Operand parse_operand(std::string text, uint32_t immediate) {
  Operand to;
  to.name = text;
  if (starts(text, "0x") || starts(text, "-0x")) {
    to.kind = Operand::kImmediate;
    to.value = strtoll(text.c_str(), nullptr, 16);
    return to;
  }
  const bool decimal = !text.empty() && text.find_first_not_of("+-0123456789.e") == std::string::npos;
  if (decimal || take_end(text, "INF") || take_end(text, "QNAN")) {
    to.kind = Operand::kImmediate;
    to.value = immediate;
    return to;
  }
  if (starts(text, "desc[")) text.erase(0, text.find(']') + 1);
  if (text[0] == '[' && text.back() == ']') {
    to.kind = Operand::kAddress;
    parse_address(text.substr(1, text.size() - 2), to);
    return to;
  }
  to.negative = take(text, "-");
  to.inverted = take(text, "~") || take(text, "!");
  if ((to.absolute = take(text, "|"))) take_end(text, "|");
  if (take(text, "c[0x0][")) {
    to.kind = Operand::kConstant;
    take_end(text, "]");
    parse_address(text, to);
    return to;
  }
  to.half = take_end(text, ".H1_H1") ? 16 : 0;
  take_end(text, ".H0_H0");
  const struct {
    Operand::Kind kind;
    const char *prefix, *last_name;
    int last;
  } files[] = {{Operand::kRegister, "R", "RZ", kRZ},
               {Operand::kUniform, "UR", "URZ", kURZ},
               {Operand::kPredicate, "P", "PT", kPT},
               {Operand::kUniformPredicate, "UP", "UPT", kPT},
               {Operand::kName, "B", "", kBarriers}};
  for (const auto& file : files) {
    if ((to.index = number_of(text, file.prefix, file.last_name, file.last)) < 0) continue;
    to.kind = file.kind;
    return to;
  }
  if (starts(text, "SR") || text == "PR") return to;
  unknown(to.name);
}

// "@!P0 IMAD.X R1, R2, 0x1, ~R3, P0"
Instruction parse_instruction(const std::string& text, uint64_t low, uint64_t high) {
  Instruction to;
  to.text = text;
  to.guard = parse_operand("PT", 0);
  std::string rest = text;
  const std::string hint = ".reuse";  // to the register file
  for (size_t i; (i = rest.find(hint)) != std::string::npos;) rest.erase(i, hint.size());
  if (take(rest, "@")) {
    const size_t end = rest.find(' ');
    to.guard = parse_operand(rest.substr(0, end), 0);
    rest = trimmed(rest.substr(end));
  }
  const size_t end = std::min(rest.find(' '), rest.size());
  Source source;
  source.unread = split(rest.substr(0, end), '.');
  source.name = source.unread[0];
  source.unread.erase(source.unread.begin());
  source.immediate = low >> 32;
  rest = trimmed(rest.substr(end));
  if (!rest.empty()) {
    const char separator = source.name == "RET" ? ' ' : ',';
    for (const std::string& part : split(rest, separator))
      source.operands.push_back(parse_operand(part, source.immediate));
  }
  to.waits = high >> 52 & 63;
  to.sets = high >> 46 & 7;
  to.clocks = std::max<int>(high >> 41 & 15, 1);
  understand(source, to);
  return to;
}

}  // namespace

std::string hex(uint64_t x) {
  char text[32];
  snprintf(text, sizeof(text), "%#" PRIx64, x);
  return text;
}

bool Source::has(const char* modifier) {
  const auto found = std::find(unread.begin(), unread.end(), modifier);
  if (found == unread.end()) return false;
  unread.erase(found);
  return true;
}

std::string Source::next() {
  if (unread.empty()) throw Fault("unknown form of opcode " + name);
  std::string modifier = unread.front();
  unread.erase(unread.begin());
  return modifier;
}

int Source::one_of(std::initializer_list<const char*> modifiers) {
  for (size_t i = 0; i < modifiers.size(); ++i) {
    if (*modifiers.begin()[i] && has(modifiers.begin()[i])) return static_cast<int>(i);
  }
  if (**modifiers.begin()) throw Fault("unknown form of opcode " + name);
  return 0;
}

const Operand& Source::at(size_t i) const {
  if (i >= operands.size()) throw Fault("too few operands");
  return operands[i];
}

std::vector<Operand> Source::predicates(size_t i) const {
  std::vector<Operand> found;
  for (; i < operands.size(); ++i) {
    const Operand& x = operands[i];
    if ((x.kind != Operand::kPredicate && x.kind != Operand::kUniformPredicate) || x.inverted) break;
    found.push_back(x);
  }
  return found;
}

std::vector<Instruction> decode(const std::string& text) {
  std::vector<Instruction> code;
  for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {
    end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    const size_t open = line.find("/*"), close = line.find("*/"), semicolon = line.find(';');
    if (open == std::string::npos || semicolon == std::string::npos || close > semicolon) continue;
    const uint32_t at = strtoul(line.c_str() + open + 2, nullptr, 16);
    const std::string what = trimmed(line.substr(close + 2, semicolon - close - 2));
    const size_t low = line.find("0x", line.find("/*", semicolon)), high = text.find("0x", end);
    if (at != code.size() * kStep || low == std::string::npos || high == std::string::npos) {
      throw Fault("text of another form: " + line);
    }
    try {
      code.push_back(parse_instruction(what, strtoull(line.c_str() + low, nullptr, 16),
                                       strtoull(text.c_str() + high, nullptr, 16)));
    } catch (const Fault& fault) {
      throw Fault(std::string(fault.what()) + "\n  at " + hex(at) + ": " + what);
    }
  }
  return code;
}

}  // namespace sass
