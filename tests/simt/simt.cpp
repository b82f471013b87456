#include "simt.h"

#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#define SIMT_UCONTEXT 1
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(SIMT_UCONTEXT)
// swapcontext without its two system calls: saves the registers that a call preserves, and changes the stack.
extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** save_stack, void* load_stack);
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
  .size simt_switch, .-simt_switch
  .popsection
)");
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kMaxThreads = 1024;
constexpr size_t kSharedBytes = 48 << 10;  // all that static __shared__ arrays may take

// ---- stacks and switching between them ------------------------------------------------------------------------------
#if defined(SIMT_ASAN)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// Below the stack lies a page that faults.
class Stack {
 public:
  Stack() : guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* p = mmap(nullptr, guard_ + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, guard_, PROT_NONE) != 0) throw std::bad_alloc();
    memory_ = static_cast<char*>(p);
  }
  ~Stack() { munmap(memory_, guard_ + kStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return memory_ + guard_; }
  void* top() const { return memory_ + guard_ + kStackBytes; }

 private:
  size_t guard_;
  char* memory_;
};

#if defined(SIMT_UCONTEXT)
struct Context {
  ucontext_t state;

  void start(const Stack& stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack.bottom();
    state.uc_stack.ss_size = kStackBytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
};
void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#else
struct Context {
  void* stack_pointer = nullptr;

  void start(const Stack& stack, void (*entry)()) {
    void** p = static_cast<void**>(stack.top());
    *--p = nullptr;  // where `entry` would return to; it also aligns the stack as a call does
    *--p = reinterpret_cast<void*>(entry);
    for (int reg = 0; reg < 6; reg++) *--p = nullptr;
    stack_pointer = p;
  }
};
void switch_context(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }
#endif

// ---- state of the block that runs -----------------------------------------------------------------------------------
enum class State : uint8_t { ready, at_barrier, in_warp_operation, finished };

struct Fiber {
  Stack stack;
  Context context;
  dim3 index;
  State state = State::finished;
  // What it brings to a warp operation, and takes away.
  alignas(8) char value[8];
  alignas(8) char result[8];
  unsigned source;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// An operation that some lanes have reached and others not yet.
struct Pending {
  WarpOp op;
  uint32_t mask;
  size_t size;
  uint32_t arrived = 0;
};

struct Warp {
  uint32_t present = 0, exited = 0;
  std::vector<Pending> pending;  // several, if parts of the warp work on their own
};

struct Barrier {
  size_t arrived = 0;
  const char* file = nullptr;
  int line = 0;
};

struct SharedArray {
  const void* tag;
  char* data;
  size_t bytes;
};

struct Machine {
  Order order = Order::forward;
  uint64_t seed = 0;
  std::mutex in_use;

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<SharedArray> shared;
  std::vector<char> shared_memory;
  size_t shared_used = 0;

  const std::function<void()>* thread = nullptr;
  size_t threads = 0, alive = 0, current = 0;
  std::exception_ptr error;

  Context main;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
};
Machine machine;

Fiber& current_fiber() { return *machine.fibers[machine.current]; }

// ---- entering and leaving a fiber -----------------------------------------------------------------------------------
void leave_fiber() {
  Fiber& f = current_fiber();
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(f.state == State::finished ? nullptr : &f.fake_stack, machine.main_stack,
                                 machine.main_stack_bytes);
#endif
  switch_context(f.context, machine.main);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(f.fake_stack, &machine.main_stack, &machine.main_stack_bytes);
#endif
}

void enter_fiber(size_t i) {
  machine.current = i;
  Fiber& f = current_fiber();
  threadIdx = f.index;
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&machine.main_fake_stack, f.stack.bottom(), kStackBytes);
#endif
  switch_context(machine.main, f.context);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(machine.main_fake_stack, nullptr, nullptr);
#endif
}

void finish_thread();

void fiber_main() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_bytes);
#endif
  try {
    (*machine.thread)();
    finish_thread();
  } catch (...) {
    machine.error = std::current_exception();
    current_fiber().state = State::finished;
  }
  leave_fiber();
  std::terminate();  // a finished fiber is never entered again
}

void start_fiber(size_t i) {
  Fiber& f = *machine.fibers[i];
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(f.stack.bottom(), kStackBytes);
  f.fake_stack = nullptr;
#endif
  f.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
  f.state = State::ready;
  f.context.start(f.stack, &fiber_main);
}

// ---- barriers -------------------------------------------------------------------------------------------------------
void release_barrier() {
  machine.barrier = {};
  for (size_t i = 0; i < machine.threads; i++)
    if (machine.fibers[i]->state == State::at_barrier) machine.fibers[i]->state = State::ready;
}

void finish_thread() {
  current_fiber().state = State::finished;
  machine.alive--;
  Warp& w = machine.warps[machine.current / warpSize];
  const uint32_t me = 1u << machine.current % warpSize;
  w.exited |= me;
  for (const Pending& p : w.pending)
    if (p.mask & me) throw Error("warp operation: a lane in its mask has exited while others wait for it");
  if (machine.alive > 0 && machine.barrier.arrived == machine.alive) release_barrier();
}

// ---- warp operations ------------------------------------------------------------------------------------------------
uint32_t lanes_of_warp(size_t warp) {
  const size_t lanes = std::min<size_t>(machine.threads - warp * warpSize, warpSize);
  return lanes == warpSize ? ~0u : (1u << lanes) - 1;
}

void complete(const Pending& p, size_t first_thread) {
  uint32_t votes = 0;
  for (unsigned l = 0; l < warpSize; l++) {
    if (!(p.mask >> l & 1)) continue;
    Fiber& f = *machine.fibers[first_thread + l];
    f.state = State::ready;
    if (p.op == WarpOp::ballot) votes |= static_cast<uint32_t>(f.value[0] != 0) << l;
    if (p.op == WarpOp::ballot || p.op == WarpOp::sync) continue;
    if (!(p.mask >> f.source & 1))
      throw Error("warp operation: lane " + std::to_string(l) + " reads lane " + std::to_string(f.source) +
                  ", which is not in the mask");
    memcpy(f.result, machine.fibers[first_thread + f.source]->value, p.size);
  }
  if (p.op == WarpOp::ballot)
    for (unsigned l = 0; l < warpSize; l++)
      if (p.mask >> l & 1) memcpy(machine.fibers[first_thread + l]->result, &votes, sizeof(votes));
}

// ---- shared memory --------------------------------------------------------------------------------------------------
constexpr size_t kRedZone = 64;  // around every array
constexpr char kRedByte = '\xa5';

void clear_shared() {
  std::vector<char>& memory = machine.shared_memory;
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(memory.data(), memory.size());
#endif
  memory.assign(2 * kSharedBytes, kRedByte);
  machine.shared.clear();
  machine.shared_used = 0;
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(memory.data(), memory.size());
#endif
}

void check_red_zones() {
#if !defined(SIMT_ASAN)  // which has reported a write by now
  const auto is_red = [](const char* p) { return std::all_of(p, p + kRedZone, [](char c) { return c == kRedByte; }); };
  for (const SharedArray& a : machine.shared)
    if (!is_red(a.data - kRedZone) || !is_red(a.data + a.bytes))
      throw Error("write outside a shared array of " + std::to_string(a.bytes) + " bytes");
#endif
}

// ---- blocks ---------------------------------------------------------------------------------------------------------
std::vector<size_t> ordered(size_t n) {
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  if (machine.order == Order::reverse) std::reverse(order.begin(), order.end());
  return order;
}

void run_block(std::mt19937_64& random) {
  const size_t n = machine.threads;
  machine.alive = n;
  machine.error = nullptr;
  machine.barrier = {};
  machine.warps.assign((n + warpSize - 1) / warpSize, Warp{});
  for (size_t i = 0; i < machine.warps.size(); i++) machine.warps[i].present = lanes_of_warp(i);
  clear_shared();
  for (size_t i = 0; i < n; i++) start_fiber(i);

  std::vector<size_t> order = ordered(n);
  while (machine.alive > 0) {
    if (machine.order == Order::random) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (const size_t i : order) {
      if (machine.fibers[i]->state != State::ready) continue;
      progress = true;
      enter_fiber(i);
      if (machine.error) std::rethrow_exception(machine.error);
    }
    if (progress) continue;
    for (const Warp& w : machine.warps)
      if (w.pending.size() > 1)
        throw Error("warp operation: lanes wait for one another with other masks or operations");
    const auto count = [&](State state) {
      return std::to_string(std::count_if(machine.fibers.begin(), machine.fibers.begin() + static_cast<ptrdiff_t>(n),
                                          [&](const auto& f) { return f->state == state; }));
    };
    throw Error("deadlock: " + count(State::at_barrier) + " threads in __syncthreads(), " +
                count(State::in_warp_operation) + " in a warp operation, " + count(State::finished) + " have exited");
  }
  check_red_zones();
}

void check_launch(dim3 grid, dim3 block) {
  const auto text = [](dim3 d) { return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z); };
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) throw Error("launch with blocks of " + text(block));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
    throw Error("launch with a grid of " + text(grid));
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  machine.order = order;
  machine.seed = seed;
}

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const std::lock_guard lock(machine.in_use);
  check_launch(grid, block);
  gridDim = grid;
  blockDim = block;
  machine.thread = &thread;
  machine.threads = size_t{block.x} * block.y * block.z;
  while (machine.fibers.size() < machine.threads) machine.fibers.push_back(std::make_unique<Fiber>());

  std::mt19937_64 random(machine.seed);
  std::vector<size_t> blocks = ordered(size_t{grid.x} * grid.y * grid.z);
  if (machine.order == Order::random) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const size_t i : blocks) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(random);
  }
}

void* shared_array(const void* tag, size_t bytes, size_t alignment) {
  for (const SharedArray& a : machine.shared)
    if (a.tag == tag) return a.data;
  machine.shared_used = (machine.shared_used + alignment - 1) / alignment * alignment + bytes;
  if (machine.shared_used > kSharedBytes)
    throw Error("shared arrays of " + std::to_string(machine.shared_used) + " bytes, more than a block may have");
  char* const base = machine.shared_memory.data();
  char* const end = machine.shared.empty() ? base : machine.shared.back().data + machine.shared.back().bytes;
  const uintptr_t step = std::max<size_t>(alignment, 16), first = reinterpret_cast<uintptr_t>(end) + kRedZone;
  char* const data = end + ((first + step - 1) / step * step - reinterpret_cast<uintptr_t>(end));
  if (data + bytes + kRedZone > base + machine.shared_memory.size()) throw Error("too many shared arrays");
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(data, bytes);
#endif
  memset(data, 0xff, bytes);  // NaN
  machine.shared.push_back({tag, data, bytes});
  return data;
}

void sync_block(const char* file, int line) {
  Barrier& b = machine.barrier;
  if (b.arrived > 0 && (b.line != line || strcmp(b.file, file) != 0))
    throw Error("__syncthreads() at " + std::string(file) + ":" + std::to_string(line) +
                " while other threads wait at " + b.file + ":" + std::to_string(b.line));
  b = {b.arrived + 1, file, line};
  if (b.arrived == machine.alive) return release_barrier();
  current_fiber().state = State::at_barrier;
  leave_fiber();
}

void warp_operation(WarpOp op, uint32_t mask, void* value, size_t size, unsigned source) {
  const size_t warp = machine.current / warpSize;
  const uint32_t me = 1u << machine.current % warpSize;
  Warp& w = machine.warps[warp];
  if (!(mask & me)) throw Error("warp operation: the calling lane is not in its own mask");
  if (mask & (w.exited | ~w.present))
    throw Error("warp operation: the mask has a lane that has exited or does not exist");
  auto p = std::find_if(w.pending.begin(), w.pending.end(),
                        [&](const Pending& q) { return q.op == op && q.mask == mask && q.size == size; });
  if (p == w.pending.end()) p = w.pending.insert(p, {op, mask, size});
  p->arrived |= me;

  Fiber& f = current_fiber();
  f.source = source;
  if (size > 0) memcpy(f.value, value, size);
  if (p->arrived == mask) {
    complete(*p, warp * warpSize);
    w.pending.erase(p);
  } else {
    f.state = State::in_warp_operation;
    leave_fiber();
  }
  if (size > 0) memcpy(value, f.result, size);
}

}  // namespace simt
