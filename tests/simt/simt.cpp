// The scheduler of tests/simt/simt.h: fibers, barriers, warps, copies.
#include "simt.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // reserved; only touched pages are used
constexpr size_t kGuardBytes = 4 << 10;
constexpr int kWarp = 32;

enum class Schedule { kLockstep, kFirstWarp, kLastWarp, kRandom };
enum class State { kRunnable, kAtBlock, kAtWarp, kDone };

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- fibers

#if defined(__x86_64__)
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

struct Context {
  void* sp = nullptr;
  void prepare(char* stack, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;  // the return address of `entry`, which never returns; ends backtraces
    std::fill(top - 6, top, nullptr);
    sp = top - 6;
  }
  static void swap(Context& from, Context& to) { simt_switch(&from.sp, to.sp); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack = {stack, 0, kStackBytes};
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Thread {
  Context context;
  char* stack = nullptr;  // above a guard page
  State state = State::kRunnable;
  uint3 index{};
  Exchange exchanges[2];  // of this collective and of the next, which another lane may be in
  int collectives = 0;
  const void* site = nullptr;
  std::vector<Copy> open;                 // not yet in a group
  std::vector<std::vector<Copy>> groups;  // oldest first
};

struct Warp {
  uint32_t runnable = 0;
  int waiting = 0, lanes = 0;
};

// --- one launch at a time, of one host thread

struct Machine {
  bool copies_early = false;
  Schedule schedule = Schedule::kLockstep;
  std::mt19937 random;
  std::string failure;
  std::set<const void*> launched;

  std::vector<Thread> threads;  // grows, never shrinks: stacks are kept
  std::vector<Warp> warps;
  int count = 0, done = 0, at_block = 0, current = 0, last_warp = 0;
  bool failed = false;
  dim3 grid, block;
  uint3 block_index{};
  const std::function<void()>* body = nullptr;
  void* shared = nullptr;
  Context scheduler;
#if defined(__SANITIZE_ADDRESS__)
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
#endif
};

Machine machine;

Thread& self() { return machine.threads[machine.current]; }
Warp& warp_of(int thread) { return machine.warps[thread / kWarp]; }

void to_scheduler() {
  Thread& thread = self();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(thread.state == State::kDone ? nullptr : &fake,
                                 machine.main_stack, machine.main_stack_bytes);
  Context::swap(thread.context, machine.scheduler);
  __sanitizer_finish_switch_fiber(fake, &machine.main_stack, &machine.main_stack_bytes);
#else
  Context::swap(thread.context, machine.scheduler);
#endif
}

void to_thread(int index) {
  machine.current = index;
  Thread& thread = machine.threads[index];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, thread.stack, kStackBytes);
  Context::swap(machine.scheduler, thread.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  Context::swap(machine.scheduler, thread.context);
#endif
}

std::string place(int thread) {
  const uint3& b = machine.block_index;
  return " (block " + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) +
         ", thread " + std::to_string(thread) + ")";
}

// What waits, so that the reader of a deadlock sees who is where.
std::string waiting() {
  std::string text;
  for (int i = 0; i < machine.count; i++) {
    const State state = machine.threads[i].state;
    if (i > 0 && state == machine.threads[i - 1].state) continue;
    const char* what = state == State::kAtBlock  ? "at a block's barrier"
                       : state == State::kAtWarp ? "at a warp's collective"
                                                 : "done";
    text += (text.empty() ? "; from thread " : ", from ") + std::to_string(i) + " " + what;
  }
  return text;
}

void release_block() {
  for (int i = 0; i < machine.count; i++) {
    machine.threads[i].state = State::kRunnable;
    warp_of(i).runnable |= 1u << i % kWarp;
  }
  machine.at_block = 0;
}

void release_warp(int first) {
  Warp& warp = warp_of(first);
  for (int i = first; i < first + warp.lanes; i++) {
    machine.threads[i].state = State::kRunnable;
    warp.runnable |= 1u << i % kWarp;
  }
  warp.waiting = 0;
}

void stop(State state) {
  Thread& thread = self();
  thread.state = state;
  warp_of(machine.current).runnable &= ~(1u << machine.current % kWarp);
}

void land(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.shared, copy.global, 16);
  } else {
    std::memset(copy.shared, 0, 16);
  }
}

void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_bytes);
#endif
  try {
    (*machine.body)();
    const Thread& thread = self();
    bool pending = !thread.open.empty();
    for (const auto& group : thread.groups) pending = pending || !group.empty();
    if (pending) fail("a thread ended with asynchronous copies that it did not wait for");
    if (machine.at_block > 0) fail("a thread ended while others wait at a block's barrier");
  } catch (const Failure& failure) {
    machine.failure = failure.what();
    machine.failed = true;
  }
  stop(State::kDone);
  machine.done++;
  to_scheduler();
  std::abort();  // nobody resumes a thread that is done
}

void start_block(uint3 index, size_t shared_bytes) {
  machine.block_index = index;
  machine.done = machine.at_block = machine.last_warp = 0;
  if (shared_bytes > 0) std::memset(machine.shared, 0xff, shared_bytes);
  machine.warps.assign((machine.count + kWarp - 1) / kWarp, Warp{});
  for (int i = 0; i < machine.count; i++) {
    Thread& thread = machine.threads[i];
    thread.context.prepare(thread.stack, run_thread);
    thread.state = State::kRunnable;
    const auto n = static_cast<unsigned>(i);
    thread.index = {n % machine.block.x, n / machine.block.x % machine.block.y,
                    n / (machine.block.x * machine.block.y)};
    thread.collectives = 0;
    thread.open.clear();
    thread.groups.clear();
    warp_of(i).runnable |= 1u << i % kWarp;
    warp_of(i).lanes++;
  }
}

// The warp that runs next, or -1 where none can.
int next_warp() {
  const int n = static_cast<int>(machine.warps.size());
  int first = 0, step = 1;
  switch (machine.schedule) {
    case Schedule::kFirstWarp: break;
    case Schedule::kLastWarp: first = n - 1, step = n - 1; break;
    case Schedule::kLockstep: first = machine.last_warp + 1; break;
    case Schedule::kRandom: first = static_cast<int>(machine.random() % n); break;
  }
  for (int i = 0; i < n; i++) {
    const int warp = (first + i * step) % n;
    if (machine.warps[warp].runnable != 0) return machine.last_warp = warp;
  }
  return -1;
}

// Runs a block to its end, or until something fails.
void run_block(uint3 index, size_t shared_bytes) {
  start_block(index, shared_bytes);
  while (machine.done < machine.count && !machine.failed) {
    const int warp = next_warp();
    if (warp < 0) {
      const bool ended = machine.at_block + machine.done == machine.count;
      const char* what = ended ? "a thread ended without the block's barrier that others wait at"
                               : "deadlock: a barrier that not all threads reach";
      machine.failure = what + place(0) + waiting();
      machine.failed = true;
      return;
    }
    const int turn =
        machine.schedule == Schedule::kRandom ? static_cast<int>(machine.random() % kWarp) : 0;
    // Each lane of those that could run now, once: until it waits.
    const uint32_t runnable = machine.warps[warp].runnable;
    for (int i = 0; i < kWarp && !machine.failed; i++) {
      const int lane = (i + turn) % kWarp;
      if (runnable >> lane & 1) to_thread(warp * kWarp + lane);
    }
  }
}

bool reserve_stacks(int count) {
  while (static_cast<int>(machine.threads.size()) < count) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    mprotect(memory, kGuardBytes, PROT_NONE);
    machine.threads.emplace_back();
    machine.threads.back().stack = static_cast<char*>(memory) + kGuardBytes;
  }
  return true;
}

cudaError_t refuse(cudaError_t error, const char* message) {
  machine.failure = message;
  return error;
}

}  // namespace

uint3 thread_index() { return self().index; }
uint3 block_index() { return machine.block_index; }
dim3 block_size() { return machine.block; }
dim3 grid_size() { return machine.grid; }
int lane() { return machine.current % kWarp; }
void* shared_memory() { return machine.shared; }
const char* failure() { return machine.failure.c_str(); }

void fail(const char* message) { throw Failure(message + place(machine.current)); }

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                const std::function<void()>& body) {
  machine.launched.insert(kernel);
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "invalid launch configuration");
  }
  if (shared_bytes > 227 * 1024) {
    return refuse(cudaErrorInvalidValue, "more shared memory than a block can have");
  }
  machine.count = static_cast<int>(threads);
  if (!reserve_stacks(machine.count)) return refuse(cudaErrorMemoryAllocation, "no stacks");
  // Of its exact size, so that the address sanitizer sees its end.
  if (posix_memalign(&machine.shared, 128, std::max<size_t>(shared_bytes, 1)) != 0) {
    return refuse(cudaErrorMemoryAllocation, "no shared memory");
  }
  std::unique_ptr<void, void (*)(void*)> owner(machine.shared, std::free);
  machine.grid = grid;
  machine.block = block;
  machine.body = &body;
  machine.failed = false;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (machine.schedule == Schedule::kRandom) {
    std::shuffle(order.begin(), order.end(), machine.random);
  } else if (machine.schedule == Schedule::kLastWarp) {
    std::reverse(order.begin(), order.end());
  }
  for (int64_t i : order) {
    run_block({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
               static_cast<unsigned>(i / grid.x / grid.y)},
              shared_bytes);
    if (machine.failed) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

void sync_block() {
  stop(State::kAtBlock);
  if (++machine.at_block == machine.count) release_block();
  to_scheduler();
}

Exchange& exchange() { return self().exchanges[self().collectives % 2]; }

void meet(const void* site, void (*all)(Lanes)) {
  Thread& thread = self();
  Warp& warp = warp_of(machine.current);
  if (warp.lanes != kWarp) fail("a collective in a warp of fewer than 32 lanes");
  thread.site = site;
  stop(State::kAtWarp);
  const int first = machine.current / kWarp * kWarp;
  if (++warp.waiting == kWarp) {
    Exchange* lanes[kWarp];
    for (int i = 0; i < kWarp; i++) {
      Thread& other = machine.threads[first + i];
      if (other.site != site) fail("lanes of a warp meet at different collectives");
      lanes[i] = &other.exchanges[other.collectives % 2];
    }
    all(lanes);
    release_warp(first);
  }
  to_scheduler();
  thread.collectives++;
}

void sync_warp() { meet(__builtin_return_address(0), [](Lanes) {}); }

void require_aligned(const void* p, const char* message) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail(message);
}

void copy_async(void* shared, const void* global, bool valid) {
  require_aligned(shared, "asynchronous copy to an address that is not aligned to 16 bytes");
  require_aligned(global, "asynchronous copy from an address that is not aligned to 16 bytes");
  const Copy copy{shared, global, valid};
  if (machine.copies_early) land(copy);
  self().open.push_back(copy);
}

void copy_async_commit() {
  Thread& thread = self();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void copy_async_wait(int pending) {
  auto& groups = self().groups;
  const int landing = std::max(0, static_cast<int>(groups.size()) - pending);
  for (int i = 0; i < landing && !machine.copies_early; i++) {
    for (const Copy& copy : groups[i]) land(copy);
  }
  groups.erase(groups.begin(), groups.begin() + landing);
}

void load_matrix(uint32_t (&r)[4], const void* row, bool transposed) {
  require_aligned(row, "ldmatrix of a row that is not aligned to 16 bytes");
  Exchange& mine = exchange();
  std::memcpy(mine.in, &row, sizeof row);
  mine.in[2] = transposed;
  meet(__builtin_return_address(0), [](Lanes lanes) {
    for (int lane = 0; lane < kWarp; lane++) {
      auto* out = reinterpret_cast<uint16_t*>(lanes[lane]->out);
      for (int i = 0; i < 8; i++) {
        const int matrix = i / 2, word = lane % 4 * 2 + i % 2;
        const bool turn = lanes[0]->in[2] != 0;
        const int from_row = turn ? word : lane / 4, column = turn ? lane / 4 : word;
        const uint16_t* source;
        std::memcpy(&source, lanes[8 * matrix + from_row]->in, sizeof source);
        out[i] = source[column];
      }
    }
  });
  std::memcpy(r, mine.out, sizeof r);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  Exchange& mine = exchange();
  std::memcpy(mine.in, a, sizeof a);
  mine.in[4] = b0;
  mine.in[5] = b1;
  mine.in[6] = bf16;
  std::memcpy(mine.out, d, sizeof d);
  meet(__builtin_return_address(0), [](Lanes lanes) {
    const bool bf16 = lanes[0]->in[6] != 0;
    const auto number = [&](int lane, int word, int part) {
      const auto bits = static_cast<unsigned short>(lanes[lane]->in[word] >> 16 * part);
      return bf16 ? __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}))
                  : __half2float(__half(__half_raw{bits}));
    };
    float left[16][16], right[16][8];
    for (int k = 0; k < 16; k++) {
      const int t = k % 8 / 2;
      for (int m = 0; m < 16; m++) {
        left[m][k] = number(m % 8 * 4 + t, m / 8 + 2 * (k / 8), k % 2);
      }
      for (int n = 0; n < 8; n++) right[k][n] = number(n * 4 + t, 4 + k / 8, k % 2);
    }
    for (int m = 0; m < 16; m++) {
      float sums[8];
      for (int n = 0; n < 8; n++) {
        std::memcpy(&sums[n], &lanes[m % 8 * 4 + n / 2]->out[m / 8 * 2 + n % 2], 4);
      }
      for (int k = 0; k < 16; k++) {
        for (int n = 0; n < 8; n++) sums[n] += left[m][k] * right[k][n];
      }
      for (int n = 0; n < 8; n++) {
        std::memcpy(&lanes[m % 8 * 4 + n / 2]->out[m / 8 * 2 + n % 2], &sums[n], 4);
      }
    }
  });
  std::memcpy(d, mine.out, sizeof d);
}

}  // namespace simt

EXPORT void simt_configure(int copies_early, int schedule, unsigned seed) {
  simt::machine.copies_early = copies_early != 0;
  simt::machine.schedule = static_cast<simt::Schedule>(schedule);
  simt::machine.random.seed(seed);
}

EXPORT const char* simt_failure() { return simt::failure(); }

// Where in this library the kernels are that ran: up to `n` offsets; returns how many there are.
EXPORT int simt_launched(uint64_t* offsets, int n) {
  Dl_info library;
  dladdr(reinterpret_cast<const void*>(&simt_launched), &library);
  int count = 0;
  for (const void* kernel : simt::machine.launched) {
    if (count < n) {
      offsets[count] = static_cast<const char*>(kernel) - static_cast<char*>(library.dli_fbase);
    }
    count++;
  }
  return count;
}
