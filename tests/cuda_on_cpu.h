// CUDA kernels compiled as C++ and run on one CPU thread: tests of their indexing, arithmetic, barriers and bounds.
//
// A driver is one source file, compiled and called by tests/cuda_on_cpu.py:
//
//   #include "cuda_on_cpu.h"
//   namespace similarity {  // that of kernels which say `extern __shared__ ... shared_memory[]`
//   CUDA_ON_CPU_SHARED_MEMORY(shared_memory)
//   }
//   #include "similarity_cuda/kernels.cuh"
//   void row_sums(const float* x, float* sums, int rows, int columns) {
//     cuda_on_cpu::launch<similarity::row_sums<128>>(rows, 128, 128 * sizeof(float), x, sums, columns);
//   }
//   CUDA_ON_CPU_EXPORT(row_sums)
//
// Each thread of a block is a fiber with a stack of its own; blocks run one after another. Between two meetings
// (barriers, warp operations) a thread runs undisturbed. Blocks, the warps of a block and the lanes of a warp take
// turns in an order that the seed scrambles, so a kernel that lacks a barrier is wrong under some seeds. Threads that
// do not meet are an error: at a barrier all threads of the block must come to the same line, at a warp operation all
// lanes of the mask, which must exist. That is stricter than a GPU, where threads that ended may be absent.
//
// Before each block shared memory is filled with 0xff: NaN, or -1. The address sanitizer catches what lies beyond the
// bytes asked for at launch; for shared arrays of fixed size that takes -fsanitize=bounds.
//
// Not seen here: `x += 1` in several threads where atomicAdd is due (they do not interrupt each other), the order in
// which memory becomes visible, speed. A loop that waits for another thread never ends.

#pragma once

#include <link.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_CPU_ASAN
#endif
#endif
#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// --------------------------------------------------------------------------------------------------- the language

#define __global__ __attribute__((noinline))  // the kernel's name stands in stack traces
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Inside a function thread_local means static, and unlike static it can follow extern.
#define __shared__ thread_local

#define CUDA_ON_CPU_VECTORS(T, name)                                                      \
  struct name##2 { T x, y; } __attribute__((aligned(2 * sizeof(T))));                     \
  struct name##3 { T x, y, z; };                                                          \
  struct name##4 { T x, y, z, w; } __attribute__((aligned(16)));                          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                              \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                      \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// -------------------------------------------------------------------------------------------- switching of stacks

// void cuda_on_cpu_switch(void** save, void* load): keep what a function must preserve on this stack, store the stack
// pointer in *save, and go on where the stack `load` was left. A new stack holds zeros and, at kEntry, where to begin.
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
  .text
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
)");
namespace cuda_on_cpu {
constexpr int kSaved = 8, kEntry = 6;  // in words; the last is the return address of the first function: none
}
#elif defined(__aarch64__)
asm(R"(
  .text
  .type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
namespace cuda_on_cpu {
constexpr int kSaved = 20, kEntry = 11;
}
#else
#error "cuda_on_cpu.h knows how to switch stacks on x86-64 and aarch64 only"
#endif

namespace cuda_on_cpu {

// The code from here to "CUDA's functions" prefers plain arrays and printf to templates: every driver compiles it, with
// sanitizers.

using Error = std::runtime_error;

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

// ------------------------------------------------------------------------------------------------- a block's threads

constexpr unsigned kSharedBytes = 232448;  // of a block, on compute capability 9.0
constexpr unsigned kThreads = 1024, kLanes = 32;
#ifdef CUDA_ON_CPU_ASAN
constexpr size_t kStackBytes = 256 << 10;  // the sanitizer writes its report on the stack of the thread at fault
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

enum class State { ready, at_warp, at_block, ended };

struct Thread {
  State state;
  uint3 index;
  unsigned char* stack;
  void* stack_pointer;
  void* fake_stack;  // the sanitizer's
  // Where it waits: the operation, the function and line that called it, and what it brings there.
  const char* call;
  const char* function;
  int line;
  unsigned mask;
  uint64_t value;
  int source;  // the lane whose value it wants
  // What it takes away: that value; the ballot of the warp, or how many threads of the block brought a value but 0.
  uint64_t result;
  unsigned together;
};

struct Random {  // xorshift64*
  uint64_t state;
  unsigned below(unsigned end) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return uint32_t((state * 0x2545f4914f6cdd1dULL) >> 32) % end;
  }
  void shuffle(unsigned* items, unsigned count) {
    for (; count > 1; --count) std::swap(items[count - 1], items[below(count)]);
  }
};

struct Machine {
  std::string kernel_name;      // empty while no kernel runs
  void (*kernel)(const void*);  // called with `arguments` by each thread
  const void* arguments;
  Thread threads[kThreads];  // of the block that runs
  unsigned thread_count;
  Thread* running;
  std::string error;  // of the thread that ran last
  void* stack_pointer;  // of the scheduler; its stack
  const void* stack;
  size_t stack_bytes;
  Random random;
};
inline Machine machine;

// Dynamic shared memory, one for each namespace that has kernels.
struct SharedMemory {
  unsigned char* bytes;
  SharedMemory* next;
  static inline SharedMemory* first = nullptr;
  explicit SharedMemory(unsigned char* bytes) : bytes(bytes), next(first) { first = this; }
};
#define CUDA_ON_CPU_SHARED_MEMORY(name)                                             \
  alignas(1024) thread_local unsigned char name[cuda_on_cpu::kSharedBytes];         \
  static cuda_on_cpu::SharedMemory name##_entry(name);

inline uint3 position(unsigned i, dim3 size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

inline std::string place() {
  return format("kernel %s, block (%u, %u, %u)", machine.kernel_name.c_str(), blockIdx.x, blockIdx.y, blockIdx.z);
}
inline std::string place_of_thread() {
  return place() + format(", thread (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z);
}

#ifdef CUDA_ON_CPU_ASAN
inline void before_switch(void** fake, const void* to, size_t bytes) {
  __sanitizer_start_switch_fiber(fake, to, bytes);
}
inline void after_switch(void* fake, const void** from, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake, from, bytes);
}
#else
inline void before_switch(void**, const void*, size_t) {}
inline void after_switch(void*, const void**, size_t*) {}
#endif

// Runs a thread until it waits or ends.
inline void resume(Thread& thread) {
  machine.running = &thread;
  threadIdx = thread.index;
  void* fake;
  before_switch(&fake, thread.stack, kStackBytes);
  cuda_on_cpu_switch(&machine.stack_pointer, thread.stack_pointer);
  after_switch(fake, nullptr, nullptr);
  if (!machine.error.empty()) throw Error(place_of_thread() + ": " + machine.error);
}

inline void suspend(State state) {
  Thread& thread = *machine.running;
  thread.state = state;
  before_switch(state == State::ended ? nullptr : &thread.fake_stack, machine.stack, machine.stack_bytes);
  cuda_on_cpu_switch(&thread.stack_pointer, machine.stack_pointer);
  after_switch(thread.fake_stack, &machine.stack, &machine.stack_bytes);
}

// The first function on each stack. It never returns.
inline void enter() {
  after_switch(nullptr, &machine.stack, &machine.stack_bytes);
  try {
    machine.kernel(machine.arguments);
  } catch (const std::exception& error) {
    machine.error = error.what();
  } catch (...) {
    machine.error = "an exception of unknown type";
  }
  suspend(State::ended);
}

inline void start(unsigned i) {
  Thread& thread = machine.threads[i];
  if (thread.stack == nullptr) {
    const size_t guard = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw Error("no memory for a thread's stack");
    thread.stack = static_cast<unsigned char*>(memory) + guard;
  }
  // Stacks begin at different places of their pages: else they would compete for the same sets of the cache.
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes - i % 16 * 192) - kSaved;
#ifdef CUDA_ON_CPU_ASAN
  __asan_unpoison_memory_region(top - 512, 512 * sizeof *top);  // where `enter` and `suspend` were left before
#endif
  std::fill(top, top + kSaved, nullptr);
  top[kEntry] = reinterpret_cast<void*>(&enter);
  thread.stack_pointer = top;
  thread.index = position(i, blockDim);
  thread.state = State::ready;
}

// --------------------------------------------------------------------------------------------------------- meetings

inline std::string doing(const Thread& t) {
  if (t.state == State::ended) return "ended";
  const std::string mask = t.state == State::at_warp ? format("mask 0x%08x, ", t.mask) : "";
  return format("at %s (%s%s, line %d)", t.call, mask.c_str(), t.function, t.line);
}

// What the threads do at this moment: "threads 0-15 at __syncthreads (sums, line 7); threads 16-31 ended". Numbered as
// CUDA does: x + blockDim.x * (y + blockDim.y * z).
inline std::string situation() {
  std::string all;
  for (unsigned first = 0, last; first < machine.thread_count; first = last + 1) {
    const std::string what = doing(machine.threads[first]);
    for (last = first; last + 1 < machine.thread_count && doing(machine.threads[last + 1]) == what;) ++last;
    const std::string range = last > first ? format("s %u-%u", first, last) : format(" %u", first);
    all += (first > 0 ? "; thread" : "thread") + range + " " + what;
    if (all.size() > 800) return all + "; ...";
  }
  return all;
}

inline bool same_call(const Thread& a, const Thread& b) { return a.call == b.call || strcmp(a.call, b.call) == 0; }

// If all lanes of the mask wait at the same operation, exchanges their values; returns the lanes that can go on.
inline unsigned meet_warp(Thread* lanes, unsigned exist, const Thread& me) {
  unsigned ballot = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!(me.mask >> i & 1)) continue;
    if (i >= exist) return 0;
    const Thread& lane = lanes[i];
    if (lane.state != State::at_warp || lane.mask != me.mask || !same_call(lane, me)) return 0;
    ballot |= unsigned(lane.value != 0) << i;
  }
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!(me.mask >> i & 1)) continue;
    Thread& lane = lanes[i];
    // The value of a lane that does not take part is undefined on a GPU: all bits set shows that it was used.
    lane.result = me.mask >> lane.source & 1 ? lanes[lane.source].value : ~uint64_t(0);
    lane.together = ballot;
    lane.state = State::ready;
  }
  return me.mask;
}

// Runs the lanes of one warp until each has ended or waits for what this warp alone cannot give.
inline void run_warp(Thread* lanes, unsigned exist) {
  unsigned ready = 0;
  for (unsigned i = 0; i < exist; ++i) ready |= unsigned(lanes[i].state == State::ready) << i;
  while (ready != 0) {
    const unsigned from = machine.random.below(kLanes);
    const unsigned above = ready >> from << from;
    const unsigned lane = __builtin_ctz(above != 0 ? above : ready);
    ready &= ~(1u << lane);
    resume(lanes[lane]);
    if (lanes[lane].state == State::at_warp) ready |= meet_warp(lanes, exist, lanes[lane]);
  }
}

// Runs a block to its end: all warps up to the next barrier, in an order that differs each time, then over the barrier.
inline void run_block() {
  Thread* const threads = machine.threads;
  const unsigned count = machine.thread_count;
  unsigned warps[kThreads / kLanes], warp_count = 0;  // the first thread of each
  for (unsigned i = 0; i < count; i += kLanes) warps[warp_count++] = i;
  for (;;) {
    machine.random.shuffle(warps, warp_count);
    for (unsigned w = 0; w < warp_count; ++w) run_warp(threads + warps[w], std::min(kLanes, count - warps[w]));
    unsigned ended = 0, together = 0;
    for (unsigned i = 0; i < count; ++i) ended += threads[i].state == State::ended;
    if (ended == count) return;
    for (unsigned i = 0; i < count; ++i) {
      const Thread &t = threads[i], &other = threads[0];
      if (t.state != State::at_block || !same_call(t, other) || t.line != other.line)
        throw Error(place() + ": threads do not meet: " + situation());
      together += t.value != 0;
    }
    for (unsigned i = 0; i < count; ++i) {
      threads[i].together = together;
      threads[i].state = State::ready;
    }
  }
}

// What one thread brings to a meeting and takes away.
inline const Thread& meet(State state, const char* call, unsigned mask, uint64_t value, int source,
                          const char* function, int line) {
  Thread& me = *machine.running;
  me.call = call;
  me.function = function;
  me.line = line;
  me.mask = mask;
  me.value = value;
  me.source = source;
  suspend(state);
  return me;
}

inline int lane_number() { return (machine.running - machine.threads) % kLanes; }

inline const Thread& at_warp(const char* call, unsigned mask, uint64_t value, int source, const char* function,
                             int line) {
  if (!(mask >> lane_number() & 1))
    throw Error(format("%s (mask 0x%08x, %s, line %d): the mask leaves out its caller", call, mask, function, line));
  return meet(State::at_warp, call, mask, value, source, function, line);
}

inline unsigned at_block(const char* call, bool value, const char* function, int line) {
  return meet(State::at_block, call, 0, value, 0, function, line).together;
}

template <class T>
T shuffle(const char* call, unsigned mask, T value, int source, const char* function, int line) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = at_warp(call, mask, bits, source, function, line).result;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// ----------------------------------------------------------------------------------------------------------- launch

// Shared memory of both kinds is thread_local, so it is what this file's module has of this OS thread.
inline void fill_shared_memory([[maybe_unused]] unsigned bytes) {
#ifdef CUDA_ON_CPU_ASAN
  for (const auto* s = SharedMemory::first; s != nullptr; s = s->next)
    __asan_unpoison_memory_region(s->bytes, kSharedBytes);
#endif
#if defined(CUDA_ON_CPU_ASAN) && defined(__clang__)
  // Here the sanitizer has its own variables there too: shared arrays of fixed size keep what they held.
  for (const auto* s = SharedMemory::first; s != nullptr; s = s->next) memset(s->bytes, 0xff, kSharedBytes);
#else
  static thread_local volatile char ours;
  ours = 0;
  const auto fill = [](dl_phdr_info* module, size_t, void* variable) {
    for (const auto* part = module->dlpi_phdr; part < module->dlpi_phdr + module->dlpi_phnum; ++part) {
      const bool is_ours = size_t(variable) - size_t(module->dlpi_tls_data) < part->p_memsz;
      if (part->p_type == PT_TLS && is_ours) memset(module->dlpi_tls_data, 0xff, part->p_memsz);
    }
    return 0;
  };
  dl_iterate_phdr(fill, const_cast<char*>(&ours));
#endif
#ifdef CUDA_ON_CPU_ASAN
  for (const auto* s = SharedMemory::first; s != nullptr; s = s->next)
    __asan_poison_memory_region(s->bytes + bytes, kSharedBytes - bytes);
#endif
}

inline void check(dim3 grid, dim3 block, size_t shared_bytes) {
  const char* name = machine.kernel_name.c_str();
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || uint64_t(block.x) * block.y * block.z - 1 >= kThreads)
    throw Error(format("kernel %s: block (%u, %u, %u): a block has 1 to 1024 threads, at most 64 of them along z", name,
                       block.x, block.y, block.z));
  if (grid.x - 1 >= 0x7fffffff || grid.y - 1 >= 0xffff || grid.z - 1 >= 0xffff)
    throw Error(format("kernel %s: grid (%u, %u, %u): it has at least 1 block, at most (2147483647, 65535, 65535)",
                       name, grid.x, grid.y, grid.z));
  if (shared_bytes > kSharedBytes)
    throw Error(format("kernel %s: %zu bytes of shared memory: a block has at most %u", name, shared_bytes,
                       kSharedBytes));
}

// `signature` is that of `launch` below: "... [with auto kernel = sums<4>; Arguments = ...]".
inline void run(const char* signature, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(const void*),
                const void* arguments) {
  const char* name = strstr(signature, "kernel = ") + strlen("kernel = ");
  machine.kernel_name.assign(name, strcspn(name, ";,]"));
  machine.kernel = kernel;
  machine.arguments = arguments;
  machine.error.clear();
  check(grid, block, shared_bytes);
  gridDim = grid;
  blockDim = block;
  machine.thread_count = block.x * block.y * block.z;
  std::vector<unsigned> blocks(size_t(grid.x) * grid.y * grid.z);
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
  machine.random.shuffle(blocks.data(), blocks.size());
  for (const unsigned b : blocks) {
    blockIdx = position(b, grid);
    fill_shared_memory(shared_bytes);
    for (unsigned i = 0; i < machine.thread_count; ++i) start(i);
    run_block();
  }
  machine.kernel_name.clear();
}

// kernel<<<grid, block, shared_bytes>>>(arguments...). Throws Error where it cannot be launched, where its threads do
// not meet and where one throws; then the other threads of that block and the other blocks do not go on.
template <auto kernel, class... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  const auto thread = [=] { kernel(arguments...); };
  const auto call = [](const void* t) { (*static_cast<decltype(thread)*>(t))(); };
  run(__PRETTY_FUNCTION__, grid, block, shared_bytes, call, &thread);
}

// ---------------------------------------------------------------------------------------------- called from Python

struct Argument {  // as in cuda_on_cpu.py
  char type[8];    // "int", "float", numpy's kind and size of an array ("f4"), or "none"
  int64_t integer;
  double real;
  void* array;
  int64_t bytes;
};

inline void* to_array(const Argument& argument, char kind, int bytes) {
  const std::string type = argument.type, wanted = format("%c%d", kind, bytes);
  if (type == "none") return nullptr;
  if (type == wanted) return argument.array;
  throw Error("an argument is of type " + type + " where an array of " + wanted + " is wanted");
}
inline int64_t to_integer(const Argument& argument) {
  if (argument.type == std::string("int")) return argument.integer;
  throw Error(std::string("an argument is of type ") + argument.type + " where an integer is wanted");
}
inline double to_real(const Argument& argument) {
  if (argument.type == std::string("float")) return argument.real;
  return to_integer(argument);
}

template <class T>
T convert(const Argument& argument) {
  if constexpr (std::is_pointer_v<T>) {
    using Item = std::remove_cv_t<std::remove_pointer_t<T>>;
    constexpr char integer = std::is_same_v<Item, bool> ? 'b' : std::is_signed_v<Item> ? 'i' : 'u';
    return static_cast<T>(to_array(argument, std::is_floating_point_v<Item> ? 'f' : integer, sizeof(Item)));
  } else if constexpr (std::is_floating_point_v<T>) {
    return to_real(argument);
  } else {
    return to_integer(argument);
  }
}

// A function that Python can call. The type of `function` is put back by `call`.
struct Function {
  const char* name;
  size_t count;
  void (*function)();
  void (*call)(void (*function)(), const Argument* arguments);
  Function* next;
  static inline Function* first = nullptr;

  template <class... Parameters>
  Function(const char* name, void (*typed)(Parameters...))
      : name(name), count(sizeof...(Parameters)), function(reinterpret_cast<void (*)()>(typed)), next(first) {
    call = [](void (*function)(), const Argument* arguments) {
      const auto typed = reinterpret_cast<void (*)(Parameters...)>(function);
      call_typed(typed, arguments, std::index_sequence_for<Parameters...>());
    };
    first = this;
  }
  template <class... Parameters, size_t... i>
  static void call_typed(void (*function)(Parameters...), const Argument* arguments, std::index_sequence<i...>) {
    function(convert<Parameters>(arguments[i])...);
  }
};
#define CUDA_ON_CPU_EXPORT(function) static cuda_on_cpu::Function function##_entry(#function, function);

inline void call(const char* name, const Argument* arguments, size_t count) {
  const Function* f = Function::first;
  while (f != nullptr && strcmp(f->name, name) != 0) f = f->next;
  if (f == nullptr) throw Error("there is no such function");
  if (f->count != count) throw Error(format("%zu arguments: it takes %zu", count, f->count));
  f->call(f->function, arguments);
}

}  // namespace cuda_on_cpu

// Calls an exported function. Returns what went wrong, or a null pointer.
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_call(
    const char* name, const cuda_on_cpu::Argument* arguments, size_t count, uint64_t seed) {
  static std::string message;
  cuda_on_cpu::machine.random.state = (seed + 1) * 0x9e3779b97f4a7c15ULL;
  try {
    cuda_on_cpu::call(name, arguments, count);
  } catch (const std::exception& error) {
    message = std::string(name) + ": " + error.what();
    return message.c_str();
  }
  return nullptr;
}

#ifdef CUDA_ON_CPU_ASAN
// A program instead of a library: function, seed and a file with the arguments, which it overwrites with the results.
int main(int argc, char** argv) {
  using cuda_on_cpu::Argument;
  if (argc != 4) return 2;
  signal(SIGABRT, [](int) {  // which a sanitizer raises after its report
    if (!cuda_on_cpu::machine.kernel_name.empty()) fprintf(stderr, "in %s\n", cuda_on_cpu::place_of_thread().c_str());
    _exit(1);
  });
  FILE* file = fopen(argv[3], "r+b");
  if (file == nullptr) return 2;
  std::vector<Argument> arguments;
  for (Argument a; fread(&a, sizeof a, 1, file) == 1; arguments.push_back(a)) {
    a.array = malloc(a.bytes);  // of the exact size, so that the sanitizer knows its end
    if (fread(a.array, 1, a.bytes, file) != size_t(a.bytes)) return 2;
  }
  const char* message = cuda_on_cpu_call(argv[1], arguments.data(), arguments.size(), strtoull(argv[2], nullptr, 10));
  if (message != nullptr) {
    fprintf(stderr, "%s\n", message);
    return 1;
  }
  rewind(file);
  for (const Argument& a : arguments) {
    fwrite(&a, sizeof a, 1, file);
    fwrite(a.array, 1, a.bytes, file);
  }
  return fclose(file) == 0 ? 0 : 2;
}
#endif

// ------------------------------------------------------------------------------------------- CUDA's functions

// The two last parameters of those where threads meet are the place of the call.
#define CUDA_ON_CPU_CALLER const char *function = __builtin_FUNCTION(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_CALLER) { cuda_on_cpu::at_block("__syncthreads", true, function, line); }
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::at_block("__syncthreads_count", predicate, function, line);
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::at_block("__syncthreads_or", predicate, function, line) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::at_block("__syncthreads_and", predicate, function, line) == cuda_on_cpu::machine.thread_count;
}

inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_CPU_CALLER) {
  cuda_on_cpu::at_warp("__syncwarp", mask, 0, 0, function, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::at_warp("__ballot_sync", mask, predicate != 0, 0, function, line).together;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::at_warp("__any_sync", mask, predicate != 0, 0, function, line).together != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::at_warp("__all_sync", mask, predicate != 0, 0, function, line).together == mask;
}

// A warp's lanes form segments of `width`; a source outside of the own segment gives the own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDA_ON_CPU_CALLER) {
  const int segment = cuda_on_cpu::lane_number() & -width;
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, segment | (source & (width - 1)), function, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_CALLER) {
  const int lane = cuda_on_cpu::lane_number(), source = lane - int(delta);
  const int from = source < (lane & -width) ? lane : source;
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, from, function, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_CALLER) {
  const int lane = cuda_on_cpu::lane_number(), source = lane + int(delta);
  const int from = source > (lane | (width - 1)) ? lane : source;
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, from, function, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, CUDA_ON_CPU_CALLER) {
  const int lane = cuda_on_cpu::lane_number(), source = lane ^ lane_mask;
  const int from = source > (lane | (width - 1)) ? lane : source;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, from, function, line);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// The types a GPU has atomics for; the second parameter converts to the type of the first, as there.
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> ||
                std::is_same_v<T, float> || std::is_same_v<T, double>);
  return std::exchange(*address, *address + value);
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, long long> ||
                std::is_same_v<T, unsigned long long>);
  return std::exchange(*address, std::max(*address, value));
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, long long> ||
                std::is_same_v<T, unsigned long long>);
  return std::exchange(*address, std::min(*address, value));
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Of a number and NaN, the number.
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

namespace cuda_on_cpu {
inline float rsqrt_float(float x) { return 1 / sqrtf(x); }
}
#define rsqrtf(x) cuda_on_cpu::rsqrt_float(x)  // a macro, as newer C libraries declare a function of this name
