// A fiber: a stack of its own and a cheap switch to and from it, known to AddressSanitizer and ThreadSanitizer.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_ASM_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// SIMT_RUNTIME marks the emulator's own functions. TSan must not see them: every fiber runs them on the same
// bookkeeping, and only the kernel's accesses are on trial. Inside, use raw memory, not (instrumented) library code.
#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define SIMT_RUNTIME __attribute__((no_sanitize_thread, noinline))
#else
#define SIMT_RUNTIME
#endif

namespace simt {

// Happens-before edges, the only ones TSan knows of besides atomics: a fiber switch gives none.
SIMT_RUNTIME inline void release([[maybe_unused]] void* token) {
#if defined(SIMT_TSAN)
  __tsan_release(token);
#endif
}
SIMT_RUNTIME inline void acquire([[maybe_unused]] void* token) {
#if defined(SIMT_TSAN)
  __tsan_acquire(token);
#endif
}

#if defined(SIMT_ASM_SWITCH)
// Saves the callee-saved registers on the old stack and takes them from the new one.
extern "C" __attribute__((visibility("hidden"))) void simt_switch_stack(void** save_sp, void* load_sp);
__asm__(R"(
  .text
  .weak simt_switch_stack
  .hidden simt_switch_stack
  .type simt_switch_stack, @function
simt_switch_stack:
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
  .size simt_switch_stack, . - simt_switch_stack
)");
#endif

#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr size_t kStackBytes = 256 << 10;  // instrumented frames are several times larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kGuardBytes = 4096;  // below each stack: an overflow faults instead of writing into a neighbour

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber() { reset(); }

  // Gives the fiber a stack; the first switch to it calls entry(), which must never return.
  void create(void (*entry)()) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);
    bottom_ = stack_ = static_cast<char*>(memory) + kGuardBytes;
    size_ = kStackBytes;
#if defined(SIMT_ASM_SWITCH)
    void** sp = reinterpret_cast<void**>(stack_ + size_);
    *--sp = nullptr;                           // entry's return address; keeps the stack 16-byte aligned as after a call
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    sp_ = sp;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
#if defined(SIMT_TSAN)
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  bool created() const { return stack_ != nullptr; }

  // Drops the stack, wherever the fiber stands. Not from the fiber itself.
  void reset() {
    if (!stack_) return;
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(stack_, size_);  // frames that never returned left poison behind
#endif
#if defined(SIMT_TSAN)
    __tsan_destroy_fiber(tsan_);
#endif
    munmap(stack_ - kGuardBytes, kGuardBytes + size_);
    stack_ = nullptr;
  }

  // Makes this the fiber of the code that runs now, on the OS thread's own stack.
  SIMT_RUNTIME void adopt_this_thread() {
#if defined(SIMT_TSAN)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // Runs `to` until something switches back to `this`, which must be the fiber that runs now.
  SIMT_RUNTIME void switch_to(Fiber& to) {
    left_ = this;
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
#endif
#if defined(SIMT_TSAN)
    __tsan_switch_to_fiber(to.tsan_, /*no happens-before*/ 1);
#endif
#if defined(SIMT_ASM_SWITCH)
    simt_switch_stack(&sp_, to.sp_);
#else
    swapcontext(&context_, &to.context_);
#endif
    arrived();
  }

  // First thing on a new fiber's stack (`this`), and after every switch back.
  SIMT_RUNTIME void arrived() {
#if defined(SIMT_ASAN)
    // ASan knows the stack that was left: that is how the bounds of the OS thread's own stack become known.
    __sanitizer_finish_switch_fiber(fake_stack_, &left_->bottom_, &left_->size_);
#endif
  }

 private:
  char* stack_ = nullptr;        // null: the OS thread's own stack, or none yet
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#if defined(SIMT_ASM_SWITCH)
  void* sp_ = nullptr;
#else
  ucontext_t context_{};
#endif
#if defined(SIMT_ASAN)
  void* fake_stack_ = nullptr;
#endif
#if defined(SIMT_TSAN)
  void* tsan_ = nullptr;
#endif
  static inline thread_local Fiber* left_ = nullptr;
};

}  // namespace simt
