// Metal, emulated on a CPU for testing: just enough of the language and its library to compile the kernels of
// this project as C++14 and run them, a threadgroup's threads in lockstep. Not a Mac, not a compiler for Metal,
// and no evidence of speed. What it does show: the arithmetic, the indexing, the barriers.
//
//  - Every buffer lies against unreadable memory, on its right in one run and on its left in the other, and
//    inputs are read-only: an access outside, or a write to an input, ends the process with a message.
//  - Outputs and threadgroup memory start as NaN.
//  - Threads are coroutines that yield at barriers and SIMD-group functions. The harness runs everything twice,
//    in opposite orders of threads and threadgroups: a missing barrier gives two different results.
//  - Threads that disagree about the next barrier or SIMD-group function are an error.
#pragma once

#ifdef __APPLE__  // which asks for these before it declares ucontext's functions and MAP_ANONYMOUS
#define _XOPEN_SOURCE 600
#define _DARWIN_C_SOURCE
#endif

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

// ---------------------------------------------------------------------------------------------- types

typedef unsigned char uchar;

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint3 { uint32_t x, y, z; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

template <typename To, typename From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type changes the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float v) {
    const uint32_t b = as_type<uint32_t>(v);
    bits = std::isnan(v) ? 0x7fc0 : uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);  // to nearest even
  }
  explicit operator float() const { return as_type<float>(uint32_t(bits) << 16); }
};

struct half {
  uint16_t bits;
  half() = default;
  explicit half(float v) {
    const uint32_t b = as_type<uint32_t>(v), sign = b >> 16 & 0x8000;
    const float a = std::fabs(v);
    if (!(a < 65520.0f)) {
      bits = uint16_t(sign | (std::isnan(v) ? 0x7e00 : 0x7c00));
      return;
    }
    int e = -13;  // for 0, of which frexp says e = 0
    if (a > 0) std::frexp(a, &e);                               // a = m * 2^e, m in [1/2, 1)
    const int unit = (e < -13 ? -13 : e) - 11;                  // of the last place, subnormals included
    const uint32_t n = uint32_t(std::nearbyint(std::ldexp(a, -unit)));  // to nearest even
    bits = uint16_t(sign | ((uint32_t(unit + 24) << 10) + n));  // a carry of n moves into the exponent
  }
  explicit operator float() const {
    const int e = bits >> 10 & 31, m = bits & 1023;
    const float a = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(float(1024 + m), e - 25)
                                                       : std::ldexp(float(m), -24);
    return bits & 0x8000 ? -a : a;
  }
};
typedef bfloat bfloat16_t;
typedef half float16_t;

// ------------------------------------------------------------------------------------------- execution

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "metal emulator: %s\n", what);
  std::fflush(stderr);
  std::_Exit(3);
}

enum class State { ready, at_barrier, at_simd, done };

struct Thread {
  jmp_buf context;
  State state;
  void* data;          // a SIMD-group function's arguments and results, on the thread's own stack
  void (*function)(void**);  // computes it for all lanes at once, when all have come
  unsigned allocated;  // threadgroup arrays declared so far
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint32_t simdgroup_index_in_threadgroup, thread_index_in_simdgroup, thread_index_in_threadgroup;
};

struct Array {
  unsigned char *mapping, *data;
  size_t size;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Array> arrays;  // threadgroup memory, by order of declaration
  Thread* current;
  jmp_buf scheduler;
  void (*kernel)(void**);
  void** buffers;
};

inline Machine& machine() {
  static Machine m;
  return m;
}
inline Thread& self() { return *machine().current; }

inline size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }

const size_t guard = 4 << 20;  // unreadable bytes on both sides of everything
const size_t stack_size = 256 * 1024;
const uint32_t simd_width = 32;

inline void yield(State state) {
  self().state = state;
  if (_setjmp(self().context) == 0) {
    _longjmp(machine().scheduler, 1);
  }
}

// A function of a SIMD group: waits for all lanes, whose data it then gets.
inline void together(void* data, void (*function)(void**)) {
  self().data = data;
  self().function = function;
  yield(State::at_simd);
}

inline void enter() {
  machine().kernel(machine().buffers);
  yield(State::done);
}

inline unsigned char* reserve(size_t size) {
  void* p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    fail("cannot reserve address space");
  }
  return static_cast<unsigned char*>(p);
}

inline size_t whole_pages(size_t size) { return (size + page() - 1) / page() * page(); }

// A threadgroup array: the same memory for every thread of the group, ending at an unreadable page.
inline void* threadgroup_array(size_t size, size_t alignment) {
  Machine& m = machine();
  const unsigned index = self().allocated++;
  if (index == m.arrays.size()) {
    const size_t room = whole_pages(size);
    unsigned char* mapping = reserve(room + 2 * guard);
    mprotect(mapping + guard, room, PROT_READ | PROT_WRITE);
    const size_t shift = (room - size) & ~(alignment - 1);
    m.arrays.push_back(Array{mapping, mapping + guard + shift, size});
    std::memset(m.arrays[index].data, 0xff, size);
  }
  if (m.arrays[index].size != size) {
    fail("threads declare different threadgroup arrays");
  }
  return m.arrays[index].data;
}

inline void start(Thread& t, unsigned index) {
  static std::vector<unsigned char*> stacks;
  static ucontext_t creator;
  while (stacks.size() <= index) {
    unsigned char* stack = reserve(stack_size + page());
    mprotect(stack + page(), stack_size, PROT_READ | PROT_WRITE);
    stacks.push_back(stack + page());
  }
  static ucontext_t first;
  getcontext(&first);
  first.uc_stack.ss_sp = stacks[index];
  first.uc_stack.ss_size = stack_size;
  first.uc_link = nullptr;
  makecontext(&first, enter, 0);
  machine().current = &t;
  if (_setjmp(machine().scheduler) == 0) {
    swapcontext(&creator, &first);
  }
}

inline void resume(Thread& t) {
  machine().current = &t;
  if (_setjmp(machine().scheduler) == 0) {
    _longjmp(t.context, 1);
  }
}

// Lets every thread that can run do so, until none can.
inline void run_threadgroup(bool backwards) {
  Machine& m = machine();
  const unsigned n = unsigned(m.threads.size());
  std::vector<bool> started(n, false);
  for (;;) {
    for (unsigned i = 0; i < n; ++i) {
      const unsigned index = backwards ? n - 1 - i : i;
      Thread& t = m.threads[index];
      if (!started[index]) {
        started[index] = true;
        start(t, index);
      } else if (t.state == State::ready) {
        resume(t);
      }
    }
    bool progress = false;
    unsigned at_barrier = 0, done = 0;
    for (unsigned first = 0; first < n; first += simd_width) {
      const unsigned last = first + simd_width < n ? first + simd_width : n;
      unsigned waiting = 0;
      for (unsigned i = first; i < last; ++i) {
        waiting += m.threads[i].state == State::at_simd;
        at_barrier += m.threads[i].state == State::at_barrier;
        done += m.threads[i].state == State::done;
      }
      if (waiting == simd_width) {
        void* data[simd_width];
        for (unsigned i = first; i < last; ++i) {
          data[i - first] = m.threads[i].data;
          if (m.threads[i].function != m.threads[first].function) {
            fail("threads of a SIMD group call different functions");
          }
          m.threads[i].state = State::ready;
        }
        m.threads[first].function(data);
        progress = true;
      }
    }
    if (done == n) {
      return;
    }
    if (at_barrier == n) {
      for (Thread& t : m.threads) {
        t.state = State::ready;
      }
      progress = true;
    }
    if (!progress) {
      fail("threads of a threadgroup wait for different things");
    }
  }
}

// --------------------------------------------------------------------------------------------- buffers

struct Piece {
  size_t offset, size;
  void* data;
};

// A buffer of `total` bytes of which only the pieces exist: touching the rest ends the process.
struct Buffer {
  const char* name;
  size_t total;
  int32_t writable, pieces;
  Piece* piece;
};

struct Mapped {
  const Buffer* buffer;
  unsigned char *mapping, *data;
  size_t reserved;
};

inline std::vector<Mapped>& mapped() {
  static std::vector<Mapped> v;
  return v;
}

inline void on_fault(int, siginfo_t* info, void*) {
  const unsigned char* at = static_cast<unsigned char*>(info->si_addr);
  for (const Mapped& m : mapped()) {
    if (at >= m.mapping && at < m.mapping + m.reserved) {
      std::fprintf(stderr, "metal emulator: forbidden access to %s at byte %td of %zu\n", m.buffer->name,
                   at - m.data, m.buffer->total);
      std::_Exit(4);
    }
  }
  for (const Array& a : machine().arrays) {
    if (at >= a.mapping && at < a.mapping + whole_pages(a.size) + 2 * guard) {
      std::fprintf(stderr, "metal emulator: access outside a threadgroup array, byte %td of %zu\n",
                   at - a.data, a.size);
      std::_Exit(4);
    }
  }
  fail("access to memory that is no buffer's");
}

inline Mapped map(const Buffer& b, bool at_start) {
  const size_t room = whole_pages(b.total), reserved = room + 2 * guard;
  unsigned char* mapping = reserve(reserved);
  unsigned char* data = mapping + guard + (at_start ? 0 : room - b.total);
  for (int i = 0; i < b.pieces; ++i) {
    const Piece& p = b.piece[i];
    const size_t first = size_t(data + p.offset - mapping) / page() * page();
    const size_t size = whole_pages(size_t(data + p.offset - mapping) + p.size - first);
    mprotect(mapping + first, size, PROT_READ | PROT_WRITE);
    std::memcpy(data + p.offset, p.data, p.size);
    if (!b.writable) {
      mprotect(mapping + first, size, PROT_READ);
    }
  }
  return Mapped{&b, mapping, data, reserved};
}

// Runs a kernel over a grid of threads, as MLX dispatches it. Returns by writing the outputs' pieces.
inline void launch(void (*kernel)(void**), int count, const Buffer* buffers, const int32_t* grid,
                   const int32_t* threadgroup, bool backwards) {
  Machine& m = machine();
  std::vector<unsigned char> signal_stack(64 * 1024);
  stack_t alternative = {};
  alternative.ss_sp = signal_stack.data();
  alternative.ss_size = signal_stack.size();
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  std::vector<void*> pointers;
  mapped().clear();
  for (int i = 0; i < count; ++i) {
    mapped().push_back(map(buffers[i], backwards));
    pointers.push_back(mapped().back().data);
  }
  m.kernel = kernel;
  m.buffers = pointers.data();
  uint32_t size[3], groups[3];
  for (int i = 0; i < 3; ++i) {
    size[i] = uint32_t(threadgroup[i] < grid[i] ? threadgroup[i] : grid[i]);
    if (grid[i] % int32_t(size[i])) {
      fail("a grid that is no multiple of its threadgroup is not emulated");
    }
    groups[i] = uint32_t(grid[i]) / size[i];
  }
  m.threads.assign(size[0] * size[1] * size[2], Thread());
  const uint32_t total = groups[0] * groups[1] * groups[2];
  for (uint32_t i = 0; i < total; ++i) {
    const uint32_t g = backwards ? total - 1 - i : i;
    const uint3 group = {g % groups[0], g / groups[0] % groups[1], g / groups[0] / groups[1]};
    for (uint32_t index = 0; index < m.threads.size(); ++index) {
      Thread& t = m.threads[index];
      t.allocated = 0;
      const uint3 at = {index % size[0], index / size[0] % size[1], index / size[0] / size[1]};
      t.threadgroup_position_in_grid = group;
      t.thread_position_in_threadgroup = at;
      t.thread_position_in_grid = {group.x * size[0] + at.x, group.y * size[1] + at.y,
                                   group.z * size[2] + at.z};
      t.thread_index_in_threadgroup = index;
      t.simdgroup_index_in_threadgroup = index / simd_width;
      t.thread_index_in_simdgroup = index % simd_width;
    }
    for (const Array& a : m.arrays) {
      std::memset(a.data, 0xff, a.size);
    }
    run_threadgroup(backwards);
  }
  for (const Mapped& b : mapped()) {
    for (int i = 0; b.buffer->writable && i < b.buffer->pieces; ++i) {
      std::memcpy(b.buffer->piece[i].data, b.data + b.buffer->piece[i].offset, b.buffer->piece[i].size);
    }
    munmap(b.mapping, b.reserved);
  }
  for (const Array& a : m.arrays) {
    munmap(a.mapping, whole_pages(a.size) + 2 * guard);
  }
  m.arrays.clear();
}

}  // namespace emulator

// --------------------------------------------------------------------------------------------- library

namespace metal {
using std::fabs;
using std::fma;
namespace precise {
using std::exp;
using std::log;
inline float rsqrt(float v) { return 1 / std::sqrt(v); }
}
enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline float simd_sum(float v) {
  emulator::together(&v, [](void** lanes) {
    float sums[emulator::simd_width];
    for (unsigned i = 0; i < emulator::simd_width; ++i) {
      sums[i] = *static_cast<float*>(lanes[i]);
    }
    for (unsigned step = emulator::simd_width / 2; step > 0; step /= 2) {  // as a tree
      for (unsigned i = 0; i < step; ++i) {
        sums[i] += sums[i + step];
      }
    }
    for (unsigned i = 0; i < emulator::simd_width; ++i) {
      *static_cast<float*>(lanes[i]) = sums[0];
    }
  });
  return v;
}

inline void threadgroup_barrier(mem_flags) { emulator::yield(emulator::State::at_barrier); }
}  // namespace metal
using namespace metal;

// The harness rewrites declarations of threadgroup arrays into this, the only change to the kernel's text.
#define EMULATOR_THREADGROUP_ARRAY(type, name, count) \
  type* const name = static_cast<type*>(emulator::threadgroup_array(sizeof(type) * (count), alignof(type)))

// Address spaces are one here; see test_metal_kernels.py for the check that they are used consistently.
#define device
#define constant
#define threadgroup
#define thread
