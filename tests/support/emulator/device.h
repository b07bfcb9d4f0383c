// Stands in for csrc/cuda/device.h and for the CUDA language: blocks one after the other, threads
// as fibers that give way at barriers and exchanges, and are then resumed in random order. One
// kernel at a time.
#pragma once

#include "../common/dispatch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <type_traits>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#undef __launch_bounds__
#define __launch_bounds__(...)

// Saves the stack pointer at `from` and goes on at `to`.
extern "C" void emulator_switch(void** from, void* to);

namespace emulator {

constexpr int kWarp = 32, kMostThreads = 1024, kStack = 128 * 1024;
constexpr size_t kMostShared = 232448;   // bytes a block may ask for: those of sm_90
constexpr size_t kFence = 4096;          // bytes behind shared memory that stay as they are
constexpr unsigned char kPoison = 0xff;  // NaN

struct Index {
  unsigned x;
};
struct AsyncCopy {
  void* to;
  const void* from;
  bool valid;
};
struct Fiber {
  void* stack_pointer;
  std::vector<char> stack;
  bool done;
  Index thread;
  std::vector<AsyncCopy> copies;  // begun, not waited for
};
struct alignas(16) Slot {  // what a lane offers to its warp
  unsigned char bytes[64];
};
// How many have come to a barrier, and which barrier it is.
struct Barrier {
  int arrived, turn;
};

inline std::vector<Fiber> fibers(kMostThreads);
inline int current;
inline void* scheduler;
inline const std::function<void()>* kernel;
inline const char* name;
inline Index block, block_size, grid_size;
inline unsigned char* shared_memory;
inline Slot slots[kMostThreads];
inline Barrier whole_block, warps[kMostThreads / kWarp];
inline int votes;
inline std::mutex one_at_a_time;

[[noreturn]] inline void give_up(const char* why) {
  std::fprintf(stderr, "%s, emulated: %s\n", name, why);
  std::abort();
}
inline Fiber& self() { return fibers[static_cast<size_t>(current)]; }
inline int thread() { return static_cast<int>(self().thread.x); }
inline int lane() { return thread() % kWarp; }
inline void give_way() { emulator_switch(&self().stack_pointer, scheduler); }

inline void wait(Barrier& barrier, int count) {
  const int turn = barrier.turn;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.turn;
    give_way();
  }
  while (barrier.turn == turn) give_way();
}
inline void wait_block() { wait(whole_block, static_cast<int>(block_size.x)); }
inline void wait_warp() { wait(warps[thread() / kWarp], kWarp); }
inline int block_or(int vote) {
  votes |= vote != 0;
  wait_block();
  const int result = votes;
  wait_block();
  votes = 0;
  wait_block();
  return result;
}

// Every lane offers a value; the result is pick(value of lane l, by l).
template <typename V, typename F>
auto exchange(const V& value, F&& pick) {
  static_assert(sizeof(V) <= sizeof(Slot));
  const int first = thread() / kWarp * kWarp;
  std::memcpy(&slots[thread()], &value, sizeof(V));
  wait_warp();
  const auto result = pick([&](int l) {
    V other;
    std::memcpy(&other, &slots[first + l], sizeof(V));
    return other;
  });
  wait_warp();
  return result;
}
template <typename V>
V of_lane(V value, int from) {
  return exchange(value, [&](auto&& of) { return of(from); });
}
// The bits of the lanes for which f(value) holds.
template <typename V, typename F>
unsigned lanes_where(V value, F&& f) {
  return exchange(value, [&](auto&& of) {
    unsigned bits = 0;
    for (int l = 0; l < kWarp; ++l) bits |= static_cast<unsigned>(f(of(l))) << l;
    return bits;
  });
}
template <typename V, typename F>
V fold(V value, F&& f) {
  return exchange(value, [&](auto&& of) {
    V result = of(0);
    for (int l = 1; l < kWarp; ++l) result = f(result, of(l));
    return result;
  });
}
inline void all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) give_up("lanes of a warp are left out");
}

inline void fiber() {
  (*kernel)();
  if (!self().copies.empty()) give_up("a thread ends with copies that it did not wait for");
  self().done = true;
  give_way();
}

inline void begin(Fiber& fiber, int thread) {
  fiber.stack.resize(kStack);
  fiber.done = false;
  fiber.thread.x = static_cast<unsigned>(thread);
  const uintptr_t end = reinterpret_cast<uintptr_t>(fiber.stack.data()) + kStack;
  void** top = reinterpret_cast<void**>(end / 16 * 16);
  *--top = nullptr;  // where a function's caller would be
  *--top = reinterpret_cast<void*>(&emulator::fiber);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}

inline void run_block(std::vector<int>& order, std::mt19937& random) {
  size_t left = order.size();
  long turns = 0;
  for (int t : order) begin(fibers[static_cast<size_t>(t)], t);
  while (left > 0) {
    if (++turns > 50'000'000) give_up("threads wait for each other");
    if (turns % 3 == 1) std::shuffle(order.begin(), order.end(), random);
    for (const int t : order) {
      Fiber& fiber = fibers[static_cast<size_t>(t)];
      if (fiber.done) continue;
      current = t;
      emulator_switch(&scheduler, fiber.stack_pointer);
      left -= fiber.done;
    }
  }
}

inline void run(const char* op, int64_t blocks, int threads, size_t shared,
                const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  static std::mt19937 random(1);
  name = op;
  kernel = &body;
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(blocks);
  if (threads % kWarp != 0 || threads > kMostThreads) give_up("odd number of threads");
  if (shared > kMostShared) give_up("too much shared memory");
  std::vector<unsigned char> memory(shared + kFence + 16);
  shared_memory = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16);
  std::vector<int> order(static_cast<size_t>(threads));
  for (int t = 0; t < threads; ++t) order[static_cast<size_t>(t)] = t;
  for (int64_t b = 0; b < blocks; ++b) {
    block.x = static_cast<unsigned>(b);
    std::fill(memory.begin(), memory.end(), kPoison);
    run_block(order, random);
    if (whole_block.arrived != 0) give_up("a barrier that some threads do not reach");
    for (const Barrier& warp : warps)
      if (warp.arrived != 0) give_up("an exchange that some lanes do not reach");
    for (const unsigned char* p = shared_memory + shared; p < memory.data() + memory.size(); ++p)
      if (*p != kPoison) give_up("writes behind its shared memory");
  }
}

}  // namespace emulator

#define threadIdx (emulator::self().thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define __syncthreads() emulator::wait_block()
#define __syncthreads_or(vote) emulator::block_or(vote)
#define __syncwarp() emulator::wait_warp()
#define __popc __builtin_popcount
#define __ffs __builtin_ffs

template <typename V>
V __shfl_sync(unsigned mask, V value, int from) {
  emulator::all_lanes(mask);
  return emulator::of_lane(value, from % emulator::kWarp);
}
template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int step) {
  emulator::all_lanes(mask);
  return emulator::of_lane(value, emulator::lane() ^ step);
}
template <typename V>
V __shfl_up_sync(unsigned mask, V value, int step) {
  emulator::all_lanes(mask);
  const int lane = emulator::lane();
  return emulator::of_lane(value, lane < step ? lane : lane - step);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  emulator::all_lanes(mask);
  return emulator::lanes_where(vote, [](bool v) { return v; });
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, !vote) == 0; }
template <typename V>
unsigned __match_any_sync(unsigned mask, V value) {
  emulator::all_lanes(mask);
  return emulator::lanes_where(value, [&](V other) { return other == value; });
}
template <typename V>
V __reduce_add_sync(unsigned mask, V value) {
  emulator::all_lanes(mask);
  return emulator::fold(value, [](V a, V b) { return a + b; });
}
template <typename V>
V __reduce_max_sync(unsigned mask, V value) {
  emulator::all_lanes(mask);
  return emulator::fold(value, [](V a, V b) { return a < b ? b : a; });
}

// Threads change places at barriers only, so these are atomic as they are.
template <typename V>
V atomicAdd(V* at, V value) {
  const V before = *at;
  *at += value;
  return before;
}
template <typename V>
V atomicOr(V* at, V value) {
  const V before = *at;
  *at |= value;
  return before;
}
template <typename V>
V atomicExch(V* at, V value) {
  const V before = *at;
  *at = value;
  return before;
}
template <typename V>
V atomicCAS(V* at, V expected, V value) {
  const V before = *at;
  if (before == expected) *at = value;
  return before;
}

// Of a number and a NaN the number, as on a device.
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }

using std::isnan;
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0x1.6a09e6p-1f); }
inline double normcdf(double x) { return 0.5 * erfc(-x * 0x1.6a09e667f3bcdp-1); }

template <typename To, typename From>
inline To emulator_bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator_bits<double>(x); }

namespace spot {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
inline bool checks_wanted() { return false; }
inline void check_cuda(const char*, const char*, const Tensor&) {}

template <typename F>
auto dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kFloat64: return f(double{});
    case kFloat16: return f(__half{});
    default: return f(__nv_bfloat16{});
  }
}
template <typename F>
void dispatch(bool flag, F&& f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
// Few blocks, so that loops over a grid are run through.
inline int64_t grid_for(int64_t items, int64_t per_block) {
  return std::min<int64_t>(ceil_div(items, per_block), 7);
}
template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
inline int device_attribute(const Tensor&, cudaDeviceAttr) { return 4; }  // multiprocessors
inline size_t max_shared(const Tensor&) { return emulator::kMostShared; }

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared, cudaStream_t, const Arguments&... arguments) {
  SPOT_CHECK(blocks <= INT32_MAX, op, "the arguments need ", blocks,
             " blocks; a grid has 2^31 - 1");
  emulator::run(op, blocks, threads, shared, [&] { kernel(arguments...); });
}

inline Tensor copy_to_host(const Tensor& t) { return torch::stable::contiguous(t); }

}  // namespace spot
