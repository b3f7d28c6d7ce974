// A call with a stack of its own, which can be left and taken up again: what a CUDA thread becomes.
#pragma once

#include <algorithm>
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else  // nobody has to be told that the stack changes
#define __asan_unpoison_memory_region(begin, size) ((void)(begin), (void)(size))
#define __sanitizer_start_switch_fiber(frame, stack, size) ((void)(frame), (void)(stack), (void)(size))
#define __sanitizer_finish_switch_fiber(frame, stack, size) ((void)(frame), (void)(stack), (void)(size))
#endif

#if defined(__x86_64__) && !defined(KD_SIMT_UCONTEXT)

// Saves what a function must keep and where it is on the stack; goes on with another stack. Unlike swapcontext it asks
// nothing of the kernel, which is most of a fiber's cost.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.pushsection .text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
.popsection
)");

struct Context {
  void* top = nullptr;

  void start(char* stack, size_t size, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(stack + size) - 8;  // six registers, where to go on, a caller for alignment
    std::fill(frame, frame + 8, nullptr);
    frame[6] = reinterpret_cast<void*>(entry);
    top = frame;
  }
  static void change(Context& from, Context& to) { simt_switch(&from.top, to.top); }
};

#else

#include <ucontext.h>

struct Context {
  ucontext_t state;

  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = size;
    makecontext(&state, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};

#endif

namespace simt {

// `entry` must begin with entered() and never return.
class Fiber {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    stack_ = stack;
    size_ = size;
    context_.start(stack, size, entry);
  }

  // Runs the fiber until it leaves.
  void resume() {
    void* frame = nullptr;
    __sanitizer_start_switch_fiber(&frame, stack_, size_);
    Context::change(home_, context_);
    __sanitizer_finish_switch_fiber(frame, nullptr, nullptr);
  }

  void leave() {
    void* frame = nullptr;
    __sanitizer_start_switch_fiber(&frame, home_stack_, home_size_);
    Context::change(context_, home_);
    __sanitizer_finish_switch_fiber(frame, &home_stack_, &home_size_);
  }

  static void entered() { __sanitizer_finish_switch_fiber(nullptr, &home_stack_, &home_size_); }

 private:
  Context context_;
  char* stack_ = nullptr;
  size_t size_ = 0;

  inline static Context home_;  // who resumed the running fiber
  inline static const void* home_stack_ = nullptr;
  inline static size_t home_size_ = 0;
};

}  // namespace simt
