// The scheduler of tests/simt/simt.h: blocks, warps, barriers, copies.
#include "simt.h"

#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace simt {
namespace {

constexpr size_t kMaxShared = 227 * 1024;

enum class Schedule { kLockstep, kFirstWarp, kLastWarp, kRandom };
enum class State { kRunnable, kWaiting, kDone };

struct Copy {
  void* shared;
  const void* global;
  bool valid;
  int bytes;
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Thread {
  Fiber fiber;
  State state = State::kRunnable;
  uint3 index{};
  // What it waits at, or waited at last, and where in the kernel.
  Collective what = Collective::kSyncBlock;
  const void* site = nullptr;
  int barrier = 0;  // of sync_threads
  Exchange exchanges[2];  // of this collective and of the next, which another lane may be in
  int collectives = 0;
  std::vector<Copy> open;                 // not yet in a group
  std::vector<std::vector<Copy>> groups;  // oldest first
};

struct Warp {
  uint32_t runnable = 0;
  int waiting = 0, lanes = 0;
};

// One launch at a time, of one host thread.
struct Machine {
  bool copies_early = false;
  Schedule schedule = Schedule::kLockstep;
  std::mt19937 random;
  std::string failure;
  std::set<const void*> launched;
  int device_shared_bytes = kMaxShared;
  int64_t copied = 0;  // bytes, asynchronously, since simt_copied was asked

  std::mutex mutex;
  std::vector<Thread> threads;  // grows, never shrinks: stacks are kept
  std::vector<Warp> warps;
  int count = 0, done = 0, at_block = 0, current = 0, last_warp = 0;
  int at_barrier[16] = {};  // of sync_threads
  bool failed = false;
  dim3 grid, block;
  uint3 block_index{};
  const std::function<void()>* body = nullptr;
  char* shared = nullptr;
  size_t shared_bytes = 0;
};

Machine machine;

Thread& self() { return machine.threads[machine.current]; }
Warp& warp_of(int thread) { return machine.warps[thread / kWarp]; }

// --- messages

std::string place(int thread) {
  const uint3& b = machine.block_index;
  return " (block " + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) +
         ", thread " + std::to_string(thread) + ")";
}

const char* name(Collective what) {
  switch (what) {
    case Collective::kSyncBlock: return "sync_block";
    case Collective::kSyncThreads: return "sync_threads";
    case Collective::kSyncWarp: return "sync_warp";
    case Collective::kShuffle: return "shuffle";
    case Collective::kLoadMatrix: return "load_matrix";
    case Collective::kMma: return "mma";
  }
  return "?";
}

const char* name(const Thread& thread) {
  return thread.state == State::kDone ? "ended" : name(thread.what);
}

// Who is where: the first threads of the first runs of threads that are at the same.
std::string everybody() {
  std::string text;
  int runs = 0;
  for (int i = 0; i < machine.count; i++) {
    if (i > 0 && name(machine.threads[i]) == name(machine.threads[i - 1])) continue;
    if (++runs > 8) return text + ", ...";
    text += (i == 0 ? "; from thread 0: " : ", from " + std::to_string(i) + ": ");
    text += name(machine.threads[i]);
  }
  return text;
}

void fail_launch(const std::string& message) {
  machine.failure = message;
  machine.failed = true;
}

cudaError_t refuse(cudaError_t error, const char* message) {
  machine.failure = message;
  return error;
}

// No thread can run, and some are not done.
void fail_deadlock() {
  int waits = 0;  // a thread that waits for others
  while (machine.threads[waits].state == State::kDone) waits++;
  const char* problem = "some threads of the block do not reach the barrier that others wait at";
  for (int i = 0; i < machine.count; i++) {
    const Thread& thread = machine.threads[i];
    const bool block =
        thread.what == Collective::kSyncBlock || thread.what == Collective::kSyncThreads;
    if (thread.state != State::kWaiting || block) continue;
    problem = "some lanes of the warp do not reach the collective that others wait at";
    waits = i;
    break;
  }
  fail_launch(problem + place(waits) + everybody());
}

// --- waiting

// The running thread waits from here on.
void wait_at(Collective what, const void* site) {
  Thread& thread = self();
  thread.what = what;
  thread.site = site;
  thread.state = State::kWaiting;
  warp_of(machine.current).runnable &= ~(1u << machine.current % kWarp);
}

void release(int first, int count) {
  for (int i = first; i < first + count; i++) {
    machine.threads[i].state = State::kRunnable;
    warp_of(i).runnable |= 1u << i % kWarp;
  }
}

// A barrier of the block is one instruction for all the lanes of a warp, and so are collectives,
// but for the barrier of a warp.
void require_same_site(int first, int lanes) {
  const Thread& one = machine.threads[first];
  for (int i = first + 1; i < first + lanes; i++) {
    const Thread& other = machine.threads[i];
    const bool anywhere = one.what == Collective::kSyncWarp;
    if (other.what == one.what && (anywhere || other.site == one.site)) continue;
    const std::string where = other.what == one.what
                                  ? std::string(", two calls of ") + name(one.what)
                                  : std::string(", ") + name(one.what) + " and " + name(other.what);
    throw Failure("lanes of a warp meet at different places" + where + place(i));
  }
}

// --- copies

void land(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.shared, copy.global, copy.bytes);
    machine.copied += copy.bytes;
  } else {
    std::memset(copy.shared, 0, copy.bytes);
  }
}

bool copies_pending(const Thread& thread) {
  bool pending = !thread.open.empty();
  for (const auto& group : thread.groups) pending = pending || !group.empty();
  return pending;
}

// --- running

// What a fiber does: one thread of the kernel.
void run_thread() {
  Fiber::entered();
  Thread& thread = self();
  bool returned = true;
  try {
    (*machine.body)();
    if (copies_pending(thread)) {
      fail("a thread ended with asynchronous copies that it did not wait for");
    }
    if (machine.at_block > 0) fail("a thread ended while others wait at a barrier of the block");
  } catch (const Failure& failure) {
    fail_launch(failure.what());
    returned = false;
  }
  thread.state = State::kDone;
  warp_of(machine.current).runnable &= ~(1u << machine.current % kWarp);
  machine.done++;
  thread.fiber.end(returned);
  std::abort();  // nobody resumes a thread that is done
}

void start_block(uint3 index) {
  machine.block_index = index;
  machine.done = machine.at_block = machine.last_warp = 0;
  std::fill_n(machine.at_barrier, 16, 0);
  std::memset(machine.shared, 0xff, machine.shared_bytes);
  machine.warps.assign((machine.count + kWarp - 1) / kWarp, Warp{});
  for (int i = 0; i < machine.count; i++) {
    Thread& thread = machine.threads[i];
    thread.fiber.start(run_thread);
    const auto n = static_cast<unsigned>(i);
    thread.index = {n % machine.block.x, n / machine.block.x % machine.block.y,
                    n / (machine.block.x * machine.block.y)};
    thread.collectives = 0;
    thread.open.clear();
    thread.groups.clear();
    warp_of(i).lanes++;
  }
  release(0, machine.count);
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

// Each lane of those that can run now, once: until it waits.
void run_warp(int warp) {
  int first = 0, step = 1;
  if (machine.schedule == Schedule::kLastWarp) first = kWarp - 1, step = kWarp - 1;
  if (machine.schedule == Schedule::kRandom) {
    first = static_cast<int>(machine.random() % kWarp);
    step = static_cast<int>(machine.random() % kWarp) | 1;
  }
  const uint32_t runnable = machine.warps[warp].runnable;
  for (int i = 0; i < kWarp && !machine.failed; i++) {
    const int lane = (first + i * step) % kWarp;
    if ((runnable >> lane & 1) == 0) continue;
    machine.current = warp * kWarp + lane;
    self().fiber.resume();
  }
}

// Runs a block to its end, or until something fails.
void run_block(uint3 index) {
  start_block(index);
  while (machine.done < machine.count && !machine.failed) {
    const int warp = next_warp();
    if (warp >= 0) {
      run_warp(warp);
    } else {
      fail_deadlock();
    }
  }
}

std::vector<int64_t> block_order(int64_t blocks) {
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (machine.schedule == Schedule::kRandom) {
    std::shuffle(order.begin(), order.end(), machine.random);
  } else if (machine.schedule == Schedule::kLastWarp) {
    std::reverse(order.begin(), order.end());
  }
  return order;
}

}  // namespace

uint3 thread_index() { return self().index; }
uint3 block_index() { return machine.block_index; }
dim3 block_size() { return machine.block; }
dim3 grid_size() { return machine.grid; }
int lane() { return machine.current % kWarp; }
void* shared_memory() { return machine.shared; }
int device_shared_bytes() { return machine.device_shared_bytes; }
const char* failure() { return machine.failure.c_str(); }

void fail(const char* message) { throw Failure(message + place(machine.current)); }

void require_shared(const void* p, const char* message, int bytes) {
  const auto* byte = static_cast<const char*>(p);
  const auto* end = machine.shared + machine.shared_bytes;
  if (byte < machine.shared || byte + bytes > end) fail(message);
}

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.launched.insert(kernel);
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "invalid launch configuration");
  }
  if (shared_bytes > kMaxShared) {
    return refuse(cudaErrorInvalidValue, "more shared memory than a block can have");
  }
  while (static_cast<int64_t>(machine.threads.size()) < threads) {
    if (!machine.threads.emplace_back().fiber.reserve()) {
      machine.threads.pop_back();
      return refuse(cudaErrorMemoryAllocation, "no memory for stacks");
    }
  }
  // Of its exact size, so that the address sanitizer sees its end.
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, std::max<size_t>(shared_bytes, 1)) != 0) {
    return refuse(cudaErrorMemoryAllocation, "no memory for shared memory");
  }
  const std::unique_ptr<void, void (*)(void*)> owner(shared, std::free);
  machine.shared = static_cast<char*>(shared);
  machine.shared_bytes = shared_bytes;
  machine.count = static_cast<int>(threads);
  machine.grid = grid;
  machine.block = block;
  machine.body = &body;
  machine.failed = false;
  for (int64_t i : block_order(blocks)) {
    run_block({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
               static_cast<unsigned>(i / grid.x / grid.y)});
    if (machine.failed) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

void sync_block() {
  wait_at(Collective::kSyncBlock, __builtin_return_address(0));
  if (++machine.at_block == machine.count) {
    for (int i = 0; i < machine.count; i += kWarp) require_same_site(i, warp_of(i).lanes);
    release(0, machine.count);
    machine.at_block = 0;
  }
  self().fiber.pause();
}

void sync_threads(int barrier, int threads) {
  if (barrier < 1 || barrier > 15 || threads % kWarp != 0) {
    fail("a barrier of parts of warps, or that there is not");
  }
  self().barrier = barrier;
  wait_at(Collective::kSyncThreads, __builtin_return_address(0));
  const auto is_here = [&](const Thread& thread) {
    return thread.state == State::kWaiting && thread.what == Collective::kSyncThreads &&
           thread.barrier == barrier;
  };
  if (++machine.at_barrier[barrier] == threads) {
    for (int i = 0; i < machine.count; i++) {
      if (!is_here(machine.threads[i])) continue;
      if (i % kWarp == 0) require_same_site(i, warp_of(i).lanes);
      release(i, 1);
    }
    machine.at_barrier[barrier] = 0;
  }
  self().fiber.pause();
}

Exchange& exchange() { return self().exchanges[self().collectives % 2]; }

void meet(Collective what, const void* site, void (*all)(Lanes)) {
  Thread& thread = self();
  Warp& warp = warp_of(machine.current);
  if (warp.lanes != kWarp) fail("a collective in a warp of fewer than 32 lanes");
  wait_at(what, site);
  if (++warp.waiting == kWarp) {
    const int first = machine.current / kWarp * kWarp;
    require_same_site(first, kWarp);
    Exchange* lanes[kWarp];
    for (int i = 0; i < kWarp; i++) {
      Thread& other = machine.threads[first + i];
      lanes[i] = &other.exchanges[other.collectives % 2];
    }
    all(lanes);
    release(first, kWarp);
    warp.waiting = 0;
  }
  thread.fiber.pause();
  thread.collectives++;
}

void sync_warp() {
  meet(Collective::kSyncWarp, nullptr, [](Lanes) {});
}

void copy_async(void* shared, const void* global, bool valid, int bytes) {
  require_aligned(shared, "asynchronous copy to an address that is not aligned to its size", bytes);
  require_aligned(global, "asynchronous copy from an address that is not aligned to its size",
                  bytes);
  require_shared(shared, "asynchronous copy to what is not the block's shared memory", bytes);
  const Copy copy{shared, global, valid, bytes};
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

}  // namespace simt

// For tests/support/simt_build.py.

EXPORT void simt_configure(int copies_early, int schedule, unsigned seed) {
  simt::machine.copies_early = copies_early != 0;
  simt::machine.schedule = static_cast<simt::Schedule>(schedule);
  simt::machine.random.seed(seed);
}

EXPORT void simt_device(int shared_bytes) { simt::machine.device_shared_bytes = shared_bytes; }

// Bytes that asynchronous copies have read since the last call.
EXPORT int64_t simt_copied() { return std::exchange(simt::machine.copied, 0); }

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
