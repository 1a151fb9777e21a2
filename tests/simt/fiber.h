// A fiber: a stack of its own, and switching to and from it. For tests/simt/simt.cpp.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what a call has to preserve, on the stack, and goes on where `load` was saved.
extern "C" void simt_switch(void** save, void* load);
asm(R"(.text
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
)");
#else
#include <ucontext.h>
#endif

namespace simt {

// Between the scheduler, which runs on the stack of whoever launches, and one fiber at a time.
class Fiber {
 public:
  // The stack, above a page that nobody may touch; false where there is no memory.
  bool reserve() {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    mprotect(memory, kGuardBytes, PROT_NONE);
    stack_ = static_cast<char*>(memory) + kGuardBytes;
    return true;
  }

  // The next `resume` calls `entry`, which never returns.
  void start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    // Frames that were not returned from have left their red zones: of an `entry` that ended, a
    // few; of one that threw or was dropped, any.
    const size_t bytes = returned_ ? 4 << 10 : kStackBytes;
    __asan_unpoison_memory_region(stack_ + kStackBytes - bytes, bytes);
    returned_ = false;
#endif
    ended_ = false;
#if defined(__x86_64__)
    auto** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 2;
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;  // the return address of `entry`: backtraces end here
    std::fill(top - 6, top, nullptr);
    context_ = top - 6;
#else
    getcontext(&context_);
    context_.uc_stack = {stack_, 0, kStackBytes};
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Runs the fiber until it calls `pause` or `end`. By the scheduler.
  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStackBytes);
    swap(scheduler_, context_);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swap(scheduler_, context_);
#endif
  }

  // The first thing that `entry` does.
  static void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &main_stack_, &main_bytes_);
#endif
  }

  // Back to the scheduler, until it resumes. By the fiber.
  void pause() { leave(); }

  // The last thing that `entry` does; `returned`: what it called has returned, not thrown.
  void end(bool returned) {
    returned_ = returned;
    ended_ = true;
    leave();
  }

 private:
  static constexpr size_t kStackBytes = 256 << 10;  // only touched pages are used
  static constexpr size_t kGuardBytes = 4 << 10;

#if defined(__x86_64__)
  using Context = void*;
  static void swap(Context& from, Context& to) { simt_switch(&from, to); }
#else
  using Context = ucontext_t;
  static void swap(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(ended_ ? nullptr : &fake, main_stack_, main_bytes_);
    swap(context_, scheduler_);
    __sanitizer_finish_switch_fiber(fake, &main_stack_, &main_bytes_);
#else
    swap(context_, scheduler_);
#endif
  }

  char* stack_ = nullptr;
  bool ended_ = false, returned_ = true;
  Context context_{};
  static inline Context scheduler_{};
#if defined(__SANITIZE_ADDRESS__)
  static inline const void* main_stack_ = nullptr;
  static inline size_t main_bytes_ = 0;
#endif
};

}  // namespace simt
