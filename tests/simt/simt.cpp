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
constexpr size_t kMostAside = 3;           // blocks that wait in the middle of their work, in random order

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

// ---- state ----------------------------------------------------------------------------------------------------------
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

struct Block {
  dim3 index;
  std::vector<std::unique_ptr<Fiber>> fibers;  // at least one per thread
  std::vector<Warp> warps;
  Barrier barrier;
  size_t alive = 0;

  std::vector<SharedArray> shared;
  std::vector<char> shared_memory;
  size_t shared_used = 0;
};

struct Machine {
  Order order = Order::forward;
  uint64_t seed = 0;
  std::mt19937_64 random;
  std::mutex in_use;

  const std::function<void()>* thread = nullptr;
  size_t threads = 0;  // of a block
  std::vector<Block> blocks = std::vector<Block>(1 + kMostAside);
  // What runs now:
  Block* block = nullptr;
  size_t current = 0;  // thread
  bool may_set_aside = false, set_aside = false;
  std::exception_ptr error;

  Context main;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
};
Machine machine;

Fiber& current_fiber() { return *machine.block->fibers[machine.current]; }

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

void start_fiber(Fiber& f, size_t i) {
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
  machine.block->barrier = {};
  for (size_t i = 0; i < machine.threads; i++) {
    State& state = machine.block->fibers[i]->state;
    if (state == State::at_barrier) state = State::ready;
  }
}

void finish_thread() {
  current_fiber().state = State::finished;
  machine.block->alive--;
  Warp& w = machine.block->warps[machine.current / warpSize];
  const uint32_t me = 1u << machine.current % warpSize;
  w.exited |= me;
  for (const Pending& p : w.pending)
    if (p.mask & me) throw Error("warp operation: a lane in its mask has exited while others wait for it");
  if (machine.block->alive > 0 && machine.block->barrier.arrived == machine.block->alive) release_barrier();
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
    Fiber& f = *machine.block->fibers[first_thread + l];
    f.state = State::ready;
    if (p.op == WarpOp::ballot) votes |= static_cast<uint32_t>(f.value[0] != 0) << l;
    if (p.op == WarpOp::ballot || p.op == WarpOp::sync) continue;
    if (!(p.mask >> f.source & 1))
      throw Error("warp operation: lane " + std::to_string(l) + " reads lane " + std::to_string(f.source) +
                  ", which is not in the mask");
    memcpy(f.result, machine.block->fibers[first_thread + f.source]->value, p.size);
  }
  if (p.op == WarpOp::ballot)
    for (unsigned l = 0; l < warpSize; l++)
      if (p.mask >> l & 1) memcpy(machine.block->fibers[first_thread + l]->result, &votes, sizeof(votes));
}

// ---- shared memory --------------------------------------------------------------------------------------------------
constexpr size_t kRedZone = 64;  // around every array
constexpr char kRedByte = '\xa5';

void clear_shared(Block& block) {
  std::vector<char>& memory = block.shared_memory;
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(memory.data(), memory.size());
#endif
  memory.assign(2 * kSharedBytes, kRedByte);
  block.shared.clear();
  block.shared_used = 0;
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(memory.data(), memory.size());
#endif
}

#if defined(SIMT_ASAN)
void check_red_zones(const Block&) {}  // the sanitizer has reported a write by now
#else
void check_red_zones(const Block& block) {
  const auto is_red = [](const char* p) { return std::all_of(p, p + kRedZone, [](char c) { return c == kRedByte; }); };
  for (const SharedArray& a : block.shared)
    if (!is_red(a.data - kRedZone) || !is_red(a.data + a.bytes))
      throw Error("write outside a shared array of " + std::to_string(a.bytes) + " bytes");
}
#endif

// ---- blocks ---------------------------------------------------------------------------------------------------------
void start_block(Block& block, dim3 index) {
  const size_t n = machine.threads;
  block.index = index;
  while (block.fibers.size() < n) block.fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < n; i++) start_fiber(*block.fibers[i], i);
  block.warps.assign((n + warpSize - 1) / warpSize, Warp{});
  for (size_t i = 0; i < block.warps.size(); i++) block.warps[i].present = lanes_of_warp(i);
  block.barrier = {};
  block.alive = n;
  clear_shared(block);
}

[[noreturn]] void report_deadlock(const Block& block) {
  for (const Warp& w : block.warps)
    if (w.pending.size() > 1) throw Error("warp operation: lanes wait for one another with other masks or operations");
  const auto count = [&](State state) {
    const auto in_state = [&](const auto& fiber) { return fiber->state == state; };
    const auto begin = block.fibers.begin(), end = begin + static_cast<ptrdiff_t>(machine.threads);
    return std::to_string(std::count_if(begin, end, in_state));
  };
  throw Error("deadlock: " + count(State::at_barrier) + " threads in __syncthreads(), " + count(State::in_warp_operation) +
              " in a warp operation, " + count(State::finished) + " have exited");
}

// The numbers 0 to n - 1 in the chosen order.
std::vector<size_t> ordered(size_t n) {
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  if (machine.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (machine.order == Order::random) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

// Runs until the block is done, or is set aside: then it returns false.
bool run_block(Block& block) {
  machine.block = &block;
  machine.set_aside = false;
  blockIdx = block.index;
  std::vector<size_t> order = ordered(machine.threads);
  while (block.alive > 0) {
    bool progress = false;
    for (const size_t i : order) {
      if (block.fibers[i]->state != State::ready) continue;
      progress = true;
      enter_fiber(i);
      if (machine.error) std::rethrow_exception(machine.error);
      if (machine.set_aside) return false;
    }
    if (!progress) report_deadlock(block);
    if (machine.order == Order::random) std::shuffle(order.begin(), order.end(), machine.random);
  }
  check_red_zones(block);
  return true;
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

static uint64_t launch_count = 0;
uint64_t launches() { return launch_count; }

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  launch_count++;
  const std::lock_guard lock(machine.in_use);
  check_launch(grid, block);
  gridDim = grid;
  blockDim = block;
  machine.thread = &thread;
  machine.threads = size_t{block.x} * block.y * block.z;
  machine.error = nullptr;
  machine.random.seed(machine.seed);

  std::vector<Block*> idle, aside;
  for (Block& b : machine.blocks) idle.push_back(&b);
  for (const size_t i : ordered(size_t{grid.x} * grid.y * grid.z)) {
    Block* const b = idle.back();
    start_block(*b, dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y));
    machine.may_set_aside = machine.order == Order::random && idle.size() > 1;
    if (run_block(*b)) continue;
    aside.push_back(b);
    idle.pop_back();
  }
  machine.may_set_aside = false;
  for (Block* b : aside) run_block(*b);
}

void after_atomic() {
  if (!machine.may_set_aside || machine.random() % 2 == 0) return;
  machine.set_aside = true;
  leave_fiber();
}

void* shared_array(const void* tag, size_t bytes, size_t alignment) {
  Block& block = *machine.block;
  for (const SharedArray& a : block.shared)
    if (a.tag == tag) return a.data;
  block.shared_used = (block.shared_used + alignment - 1) / alignment * alignment + bytes;
  if (block.shared_used > kSharedBytes)
    throw Error("shared arrays of " + std::to_string(block.shared_used) + " bytes, more than a block may have");
  char* const base = block.shared_memory.data();
  char* const end = block.shared.empty() ? base : block.shared.back().data + block.shared.back().bytes;
  const uintptr_t step = std::max<size_t>(alignment, 16), first = reinterpret_cast<uintptr_t>(end) + kRedZone;
  char* const data = end + ((first + step - 1) / step * step - reinterpret_cast<uintptr_t>(end));
  if (data + bytes + kRedZone > base + block.shared_memory.size()) throw Error("too many shared arrays");
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(data, bytes);
#endif
  memset(data, 0xff, bytes);  // NaN
  block.shared.push_back({tag, data, bytes});
  return data;
}

void sync_block(const char* file, int line) {
  Barrier& b = machine.block->barrier;
  if (b.arrived > 0 && (b.line != line || strcmp(b.file, file) != 0))
    throw Error("__syncthreads() at " + std::string(file) + ":" + std::to_string(line) + " while other threads wait at " +
                b.file + ":" + std::to_string(b.line));
  b = {b.arrived + 1, file, line};
  if (b.arrived == machine.block->alive) return release_barrier();
  current_fiber().state = State::at_barrier;
  leave_fiber();
}

void warp_operation(WarpOp op, uint32_t mask, void* value, size_t size, unsigned source) {
  const size_t warp = machine.current / warpSize;
  const uint32_t me = 1u << machine.current % warpSize;
  Warp& w = machine.block->warps[warp];
  if (!(mask & me)) throw Error("warp operation: the calling lane is not in its own mask");
  if (mask & (w.exited | ~w.present)) throw Error("warp operation: the mask has a lane that has exited or does not exist");
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
