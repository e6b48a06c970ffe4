// Runs the CUDA sources of csrc/ on a CPU, thread by thread, where there is no GPU to test them on:
//
//   g++ -std=c++17 -O1 -x c++ -include tests/tools/cuda_on_cpu.h csrc/foo.cu -fPIC -shared
//
// Blocks run one after the other. The threads of a block are fibers of one OS thread: each runs on to its next barrier
// or warp exchange, and who runs next is drawn from a seed, so that a missing barrier gives wrong results under some
// seed. Seed 0 is plain ascending order. The seed is CUDA_ON_CPU_SEED of the environment until hpcloss_emulator_seed().
// What a GPU would hang on, or leave undefined, ends in abort() with a message.
//
// Not emulated: several blocks at once (a spin on a block that has not started hangs), weak memory order, and streams:
// a launch is over when it returns. Dynamic shared memory is filled with junk for each block; static __shared__ arrays
// keep what the block before left there.
#pragma once

#ifdef __CUDACC__
#error "cuda_on_cpu.h stands in for CUDA; a CUDA compiler does not need it"
#endif

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// ---------------------------------------------------------------------------------------------------- built-in names

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline int warpSize = 32;  // no constant expression in CUDA either

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

// --------------------------------------------------------------------------------------------------------- scheduler

namespace cuda_on_cpu {

// noipa: or the compiler would conclude that a switch to another fiber leaves static shared arrays as they were.
#if defined(__clang__)
#define CUDA_ON_CPU_OPAQUE __attribute__((noinline, optnone))
#else
#define CUDA_ON_CPU_OPAQUE __attribute__((noipa))
#endif

constexpr size_t kStack = 64 << 10, kGuard = 16 << 10;  // the guard is a multiple of any page size
constexpr size_t kMaxThreads = 1024, kSharedDefault = 48 << 10, kSharedMax = 227 << 10, kSharedGuard = 4096;
constexpr unsigned char kJunk = 0xCD;

#ifdef CUDA_ON_CPU_UCONTEXT
using Context = ucontext_t;

inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

CUDA_ON_CPU_OPAQUE inline void swap(Context* from, Context* to) { swapcontext(from, to); }
#else
using Context = void*;  // the stack pointer; the other registers lie on the stack

inline void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // where a return address would be: nothing to return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}

__attribute__((naked, noinline)) inline void swap_stacks(Context*, Context*) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq (%rsi), %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

CUDA_ON_CPU_OPAQUE inline void swap(Context* from, Context* to) {
  swap_stacks(from, to);
  asm volatile("" ::: "memory");
}
#endif

// Where in the sources a call stands; taken at the caller, as a default argument.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Place& other) const { return line == other.line && strcmp(file, other.file) == 0; }
};

enum Op {
  kRunning, kSync, kSyncOr, kSyncAnd, kSyncCount,  // in a row: those of the block
  kSyncwarp, kBallot, kAny, kAll, kMatch, kShfl, kShflUp, kShflDown, kShflXor,
};
inline const char* const kNames[] = {
    "running", "__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count", "__syncwarp",
    "__ballot_sync", "__any_sync", "__all_sync", "__match_any_sync", "__shfl_sync", "__shfl_up_sync",
    "__shfl_down_sync", "__shfl_xor_sync",
};

struct Thread {
  Context context;
  uint3 index;
  unsigned warp, lane;
  Op op;  // what it waits at, with these arguments:
  Place place;
  unsigned mask;
  unsigned source;  // lane to read from
  uint64_t value;   // handed in; then the result
};

struct Warp {
  unsigned live, ready;  // lanes that have not returned; those of them that may run
};

struct Machine {
  uint64_t seed, random;
  cudaError_t error = cudaSuccess;
  std::mutex mutex;
  std::map<const void*, size_t> shared_limits;

  char* stacks = nullptr;
  std::vector<Thread> threads{kMaxThreads};
  std::vector<uint64_t> shared = std::vector<uint64_t>((kSharedMax + kSharedGuard) / 8);
  Warp warps[kMaxThreads / 32];
  unsigned ready_warps;  // those with a lane that may run
  unsigned size, live, arrived, votes;  // of the block; votes: threads at its barrier with a predicate that is not 0
  bool sticky;  // run on in the same warp while it can
  Thread* current;
  Thread* first;  // to arrive at the barrier
  Context host;
  void (*body)(void*);
  void* arguments;

  Machine() {
    const char* text = getenv("CUDA_ON_CPU_SEED");
    seed = random = text ? strtoull(text, nullptr, 10) : 0;
  }
};
inline Machine machine;

inline uint64_t draw() {  // splitmix64
  uint64_t x = machine.random += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// One of the bits of `mask`, which is not 0.
inline unsigned pick(unsigned mask) {
  if (machine.seed == 0) return __builtin_ctz(mask);
  const unsigned turn = draw() & 31;
  return (__builtin_ctz(mask >> turn | mask << (-turn & 31)) + turn) & 31;
}

[[noreturn]] inline void fail(const std::string& what) {
  fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u), seed %llu: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
          static_cast<unsigned long long>(machine.seed), what.c_str());
  abort();
}

inline std::string describe(Op op, Place place) {
  return std::string(kNames[op]) + " (" + place.file + ":" + std::to_string(place.line) + ")";
}

inline std::string hex(unsigned mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

[[noreturn]] inline void fail_deadlock() {
  std::map<std::string, unsigned> waiting;
  for (unsigned i = 0; i < machine.size; ++i) {
    const Thread& t = machine.threads[i];
    if (!(machine.warps[t.warp].live >> t.lane & 1)) {
      ++waiting["have returned"];
    } else {
      const std::string with = t.op < kSyncwarp ? "" : " of warp " + std::to_string(t.warp) + ", mask " + hex(t.mask);
      ++waiting["wait at " + describe(t.op, t.place) + with];
    }
  }
  std::string text = "deadlock;";
  for (const auto& [what, count] : waiting) text += "\n  " + std::to_string(count) + " threads " + what;
  fail(text);
}

inline void make_ready(Warp& warp, unsigned lanes) {
  warp.ready |= lanes;
  if (warp.ready) machine.ready_warps |= 1u << (&warp - machine.warps);
}

// Hands over to a thread that may run, and returns when it is the turn of the calling thread again.
CUDA_ON_CPU_OPAQUE inline void run_another(Context* self) {
  Machine& m = machine;
  Context* next = &m.host;
  if (m.ready_warps) {
    const bool stay = m.sticky && m.warps[m.current->warp].ready;
    const unsigned w = stay ? m.current->warp : pick(m.ready_warps);
    const unsigned lane = pick(m.warps[w].ready);
    m.warps[w].ready &= ~(1u << lane);
    if (m.warps[w].ready == 0) m.ready_warps &= ~(1u << w);
    m.current = &m.threads[w * 32 + lane];
    threadIdx = m.current->index;
    next = &m.current->context;
  } else if (m.live) {
    fail_deadlock();
  }
  if (next != self) swap(self, next);
}

// Lets others run before an atomic operation or a fence, now and then.
inline void maybe_yield() {
  if (machine.seed == 0 || draw() & 7) return;
  Thread& t = *machine.current;
  make_ready(machine.warps[t.warp], 1u << t.lane);
  run_another(&t.context);
}

// Opens the barrier of the block if all its threads are there or have returned.
inline void open_barrier() {
  Machine& m = machine;
  if (m.arrived == 0 || m.arrived != m.live) return;
  for (unsigned i = 0; i < m.size; ++i) {
    Thread& t = m.threads[i];
    t.value = t.op == kSyncOr ? m.votes > 0 : t.op == kSyncAnd ? m.votes == m.arrived : m.votes;
    t.op = kRunning;
  }
  for (unsigned w = 0; w * 32 < m.size; ++w) make_ready(m.warps[w], m.warps[w].live);
  m.arrived = m.votes = 0;
}

inline int barrier(Op op, bool vote, Place place) {
  Machine& m = machine;
  Thread& t = *m.current;
  t.op = op;
  t.place = place;
  // Whoever waits already leaves together with this thread.
  if (m.arrived == 0) m.first = &t;
  if (m.first->op != op || !(m.first->place == place)) {
    fail("threads of a block meet at different barriers, " + describe(m.first->op, m.first->place) + " and " +
         describe(op, place));
  }
  ++m.arrived;
  m.votes += vote;
  open_barrier();
  run_another(&t.context);
  return static_cast<int>(t.value);
}

template <class F>
void for_lanes(unsigned mask, F f) {
  for (; mask; mask &= mask - 1) f(static_cast<unsigned>(__builtin_ctz(mask)));
}

// The results of an exchange, once all its lanes are there: computed at once, so that none can be overtaken.
inline void complete(Thread* lanes, unsigned mask, Op op) {
  unsigned ballot = 0;
  uint64_t results[32];
  for_lanes(mask, [&](unsigned i) { ballot |= (lanes[i].value != 0) * (1u << i); });
  for_lanes(mask, [&](unsigned i) {
    uint64_t& r = results[i];
    memset(&r, kJunk, sizeof r);  // stays so where the lane to read takes no part
    if (op <= kBallot) r = ballot;
    else if (op == kAny) r = ballot != 0;
    else if (op == kAll) r = ballot == mask;
    else if (op != kMatch && mask >> lanes[i].source & 1) r = lanes[lanes[i].source].value;
    if (op != kMatch) return;
    r = 0;
    for_lanes(mask, [&](unsigned j) { r |= (lanes[j].value == lanes[i].value) * (1u << j); });
  });
  for_lanes(mask, [&](unsigned i) {
    lanes[i].value = results[i];
    lanes[i].op = kRunning;
  });
}

inline void check_present(const Thread& t, unsigned live) {
  if (t.mask & ~live) {
    fail(describe(t.op, t.place) + " names lanes that have returned or do not exist: mask " + hex(t.mask) +
         ", lanes in the kernel " + hex(live));
  }
}

inline uint64_t exchange(Op op, unsigned mask, uint64_t value, unsigned source, Place place) {
  Machine& m = machine;
  Thread& t = *m.current;
  Thread* const lanes = &t - t.lane;
  Warp& warp = m.warps[t.warp];
  t.op = op;
  t.place = place;
  t.mask = mask;
  t.source = source;
  t.value = value;
  if (!(mask >> t.lane & 1)) {
    fail(describe(op, place) + " by lane " + std::to_string(t.lane) + ", which its mask " + hex(mask) + " leaves out");
  }
  check_present(t, warp.live);
  bool all = true;
  for_lanes(mask, [&](unsigned i) { all = all && lanes[i].op == op && lanes[i].mask == mask; });
  if (all) {
    complete(lanes, mask, op);
    make_ready(warp, mask);
  }
  run_another(&t.context);
  return t.value;
}

// The life of one fiber: one thread of one block.
inline void fiber() {
  Machine& m = machine;
  m.body(m.arguments);
  Thread& t = *m.current;
  Warp& warp = m.warps[t.warp];
  warp.live &= ~(1u << t.lane);
  --m.live;
  const Thread* lanes = &t - t.lane;
  for_lanes(warp.live, [&](unsigned i) {
    if (lanes[i].op >= kSyncwarp) check_present(lanes[i], warp.live);
  });
  open_barrier();
  run_another(&t.context);
  abort();  // not reached: nothing makes it ready again
}

inline void run_block(size_t shared_bytes) {
  Machine& m = machine;
  unsigned char* const shared = reinterpret_cast<unsigned char*>(m.shared.data());
  memset(shared, kJunk, shared_bytes + kSharedGuard);
  m.live = m.size = blockDim.x * blockDim.y * blockDim.z;
  m.arrived = m.votes = m.ready_warps = 0;
  m.sticky = m.seed != 0 && draw() & 1;
  for (unsigned i = 0; i < m.size; ++i) {
    Thread& t = m.threads[i];
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    t.warp = i / 32;
    t.lane = i % 32;
    t.op = kRunning;
    prepare(t.context, m.stacks + i * (kGuard + kStack) + kGuard, fiber);
  }
  for (unsigned w = 0; w * 32 < m.size; ++w) {
    m.warps[w] = {m.size - w * 32 < 32 ? (1u << m.size % 32) - 1 : ~0u, 0};
    make_ready(m.warps[w], m.warps[w].live);
  }
  m.current = &m.threads[0];
  run_another(&m.host);
  for (size_t i = shared_bytes; i < shared_bytes + kSharedGuard; ++i) {
    if (shared[i] != kJunk) {
      fail("wrote at byte " + std::to_string(i) + " of " + std::to_string(shared_bytes) + " of dynamic shared memory");
    }
  }
}

inline cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                            void* arguments) {
  Machine& m = machine;
  const std::lock_guard<std::mutex> lock(m.mutex);
  const uint64_t size = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const auto raised = m.shared_limits.find(kernel);
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 || size > kMaxThreads || size == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || blocks == 0 ||
      shared_bytes > (raised == m.shared_limits.end() ? kSharedDefault : std::max(kSharedDefault, raised->second))) {
    return m.error = cudaErrorInvalidValue;
  }
  if (m.stacks == nullptr) {
    const size_t bytes = kMaxThreads * (kGuard + kStack);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    m.stacks = static_cast<char*>(memory);
    for (size_t i = 0; i < kMaxThreads; ++i) mprotect(m.stacks + i * (kGuard + kStack), kGuard, PROT_NONE);
  }
  m.body = body;
  m.arguments = arguments;
  blockDim = block;
  gridDim = grid;
  std::vector<uint64_t> order(m.seed ? blocks : 0);
  for (uint64_t i = 0; i < order.size(); ++i) {  // a random order
    const uint64_t j = draw() % (i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = m.seed ? order[i] : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  return cudaSuccess;
}

template <class T>
uint64_t pack(T value) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class To, class From>
To bits_as(From from) {
  To to;
  static_assert(sizeof to <= sizeof from);
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
T shuffle(Op op, unsigned mask, T value, unsigned source, int width, Place place) {
  if (width != 32) fail(describe(op, place) + ": only width 32 is emulated");
  const unsigned from = source < 32 ? source : machine.current->lane;  // beyond the warp: its own value
  return bits_as<T>(exchange(op, mask, pack(value), from, place));
}

template <class T, class... Of>
constexpr bool one_of = (std::is_same_v<T, Of> || ...);

}  // namespace cuda_on_cpu

extern "C" inline __attribute__((used, visibility("default"))) void hpcloss_emulator_seed(unsigned long long seed) {
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::machine.mutex);
  cuda_on_cpu::machine.seed = cuda_on_cpu::machine.random = seed;
}

namespace cuda_on_cpu {
inline unsigned long long launches = 0;
}
// How many kernels have been launched.
extern "C" inline __attribute__((used, visibility("default"))) unsigned long long hpcloss_emulator_launches() {
  return cuda_on_cpu::launches;
}

// --------------------------------------------------------------------------------------------------- device functions

inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(cuda_on_cpu::machine.shared.data()); }

#define CUDA_ON_CPU_PLACE cuda_on_cpu::Place place = cuda_on_cpu::Place::here()

#define CUDA_ON_CPU_BARRIER(name, op) \
  inline int name(int p, CUDA_ON_CPU_PLACE) { return cuda_on_cpu::barrier(cuda_on_cpu::op, p != 0, place); }
CUDA_ON_CPU_BARRIER(__syncthreads_or, kSyncOr)
CUDA_ON_CPU_BARRIER(__syncthreads_and, kSyncAnd)
CUDA_ON_CPU_BARRIER(__syncthreads_count, kSyncCount)
inline void __syncthreads(CUDA_ON_CPU_PLACE) { cuda_on_cpu::barrier(cuda_on_cpu::kSync, false, place); }
inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::exchange(cuda_on_cpu::kSyncwarp, mask, 0, 0, place);
}
#define CUDA_ON_CPU_VOTE(R, name, op)                                                     \
  inline R name(unsigned mask, int p, CUDA_ON_CPU_PLACE) {                                \
    return static_cast<R>(cuda_on_cpu::exchange(cuda_on_cpu::op, mask, p != 0, 0, place)); \
  }
CUDA_ON_CPU_VOTE(unsigned, __ballot_sync, kBallot)
CUDA_ON_CPU_VOTE(int, __any_sync, kAny)
CUDA_ON_CPU_VOTE(int, __all_sync, kAll)

template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_CPU_PLACE) {
  return static_cast<unsigned>(cuda_on_cpu::exchange(cuda_on_cpu::kMatch, mask, cuda_on_cpu::pack(value), 0, place));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::kShfl, mask, value, source & 31, width, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_PLACE) {
  const unsigned lane = cuda_on_cpu::machine.current->lane;
  return cuda_on_cpu::shuffle(cuda_on_cpu::kShflUp, mask, value, lane < delta ? lane : lane - delta, width, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_PLACE) {
  const unsigned source = delta < 32 ? cuda_on_cpu::machine.current->lane + delta : 32;
  return cuda_on_cpu::shuffle(cuda_on_cpu::kShflDown, mask, value, source, width, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_CPU_PLACE) {
  const unsigned source = cuda_on_cpu::machine.current->lane ^ static_cast<unsigned>(lanes);
  return cuda_on_cpu::shuffle(cuda_on_cpu::kShflXor, mask, value, source, width, place);
}
[[noreturn]] inline unsigned __activemask() {
  cuda_on_cpu::fail("__activemask(): which lanes it names is left to the hardware; pass masks on instead");
}

inline void __threadfence() { cuda_on_cpu::maybe_yield(); }
inline void __threadfence_block() { cuda_on_cpu::maybe_yield(); }

// The types are those of CUDA's overloads: uint64_t is none of them on Linux.
#define CUDA_ON_CPU_ATOMIC(name, expression, ...)                                           \
  template <class T>                                                                        \
  T name(T* address, std::common_type_t<T> value) {                           \
    static_assert(cuda_on_cpu::one_of<T, int, unsigned, unsigned long long, ##__VA_ARGS__>); \
    cuda_on_cpu::maybe_yield();                                                             \
    const T old = *address;                                                                 \
    *address = expression;                                                                  \
    return old;                                                                             \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicMax, old < value ? value : old, long long)
CUDA_ON_CPU_ATOMIC(atomicMin, value < old ? value : old, long long)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicExch, value)

template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  static_assert(cuda_on_cpu::one_of<T, int, unsigned, unsigned long long>);
  cuda_on_cpu::maybe_yield();
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

// volatile: the result must be rounded, not fused into what is computed from it.
inline float __fadd_rn(float a, float b) { volatile float r = a + b; return r; }
inline float __fsub_rn(float a, float b) { volatile float r = a - b; return r; }
inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }
inline float __fdiv_rn(float a, float b) { volatile float r = a / b; return r; }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_as<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits_as<int>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits_as<float>(x); }

#define CUDA_ON_CPU_MIN_MAX(R, A, B)                      \
  inline R min(A a, B b) { return std::min<R>(a, b); }    \
  inline R max(A a, B b) { return std::max<R>(a, b); }
#define CUDA_ON_CPU_MIN_MAX_OF(S)                         \
  CUDA_ON_CPU_MIN_MAX(S, S, S)                            \
  CUDA_ON_CPU_MIN_MAX(unsigned S, unsigned S, unsigned S) \
  CUDA_ON_CPU_MIN_MAX(unsigned S, S, unsigned S)          \
  CUDA_ON_CPU_MIN_MAX(unsigned S, unsigned S, S)
CUDA_ON_CPU_MIN_MAX_OF(int)
CUDA_ON_CPU_MIN_MAX_OF(long)
CUDA_ON_CPU_MIN_MAX_OF(long long)
// Of floats and doubles a NaN loses, as in fmin.
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline double min(double a, double b) { return __builtin_fmin(a, b); }
inline double max(double a, double b) { return __builtin_fmax(a, b); }

// ------------------------------------------------------------------------------------------------------ host runtime

enum cudaMemcpyKind {
  cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::machine.error; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::machine.error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid argument" : "no error"; }

namespace cuda_on_cpu {

inline cudaError_t give(int* to, int value) {
  if (to == nullptr) return machine.error = cudaErrorInvalidValue;
  *to = value;
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaDriverGetVersion(int* version) { return cuda_on_cpu::give(version, 13000); }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cuda_on_cpu::give(version, 13000); }
inline cudaError_t cudaGetDevice(int* device) { return cuda_on_cpu::give(device, 0); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return cuda_on_cpu::give(value, attribute == cudaDevAttrMultiProcessorCount ? 4 : cuda_on_cpu::kSharedMax);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes) memcpy(to, from, bytes);
  return cudaSuccess;
}

struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  return kernel ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  cuda_on_cpu::Machine& m = cuda_on_cpu::machine;
  const std::lock_guard<std::mutex> lock(m.mutex);
  if (bytes < 0 || static_cast<size_t>(bytes) > cuda_on_cpu::kSharedMax) return m.error = cudaErrorInvalidValue;
  m.shared_limits[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...), done when it returns.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A... args) {
  auto call = [&] { kernel(args...); };
  ++cuda_on_cpu::launches;
  return cuda_on_cpu::run_grid(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                               [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call);
}
