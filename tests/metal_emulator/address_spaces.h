// Metal's address spaces as clang's, to check that pointers are used in the one they were declared for: an
// implicit conversion between two of them is an error. Compiled with -fsyntax-only; nothing here can run.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned int uint;
typedef __SIZE_TYPE__ size_t;
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
typedef float float4 __attribute__((ext_vector_type(4)));
typedef short half, float16_t, bfloat, bfloat16_t;  // scalars of their size

template <typename To, typename From>
To as_type(From from) {
  return __builtin_bit_cast(To, from);
}

namespace metal {
float fabs(float);
float fma(float, float, float);
float simd_sum(float);
namespace precise {
float exp(float);
float log(float);
float rsqrt(float);
}
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
}  // namespace metal
using namespace metal;

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
