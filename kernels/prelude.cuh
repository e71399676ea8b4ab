// What the kernels need of CUDA.
#define FM_DEVICE
#define FM_SHARED
#define FM_ARRAY __shared__
#define FM_LOCAL
#define FM_FUNCTION __device__ __forceinline__
#define FM_UNROLL _Pragma("unroll")

typedef __nv_bfloat16 fm_bfloat16;
typedef __half fm_float16;
typedef float fm_float32;

// Weights are read once: through the read-only path, and first to leave the caches.
template <typename T>
FM_FUNCTION T fm_load(const T* from) {
  return __ldg(from);
}

FM_FUNCTION uint4 fm_load(const uint4* from) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
}

FM_FUNCTION uint2 fm_load(const uint2* from) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}

// (word >> shift) % 2^bits as a float, without the conversion unit, which is half as wide as the others:
// the field becomes the end of a mantissa whose exponent makes its unit 1, and the leading 1 is taken off.
template <unsigned bits>
FM_FUNCTION float fm_field(unsigned word, unsigned shift) {
  const unsigned moved = shift + bits > 23 ? shift - 16 : shift;
  const unsigned from = shift + bits > 23 ? word >> 16 : word;
  const unsigned exponent = (127 + 23 - moved) << 23;
  unsigned mantissa;  // (from & mask) | exponent: one instruction, which the compiler would make two
  asm("lop3.b32 %0, %1, %2, %3, 0xea;"
      : "=r"(mantissa)
      : "r"(from), "r"(((1u << bits) - 1) << moved), "r"(exponent));
  return __uint_as_float(mantissa) - __uint_as_float(exponent);
}

FM_FUNCTION float fm_bits_to_float(unsigned bits) {
  return __uint_as_float(bits);
}

FM_FUNCTION float fm_half_pair(unsigned word, unsigned which) {
  return __half2float(__ushort_as_half((unsigned short)(word >> (16 * which))));
}

FM_FUNCTION unsigned fm_min(unsigned a, unsigned b) {
  return a < b ? a : b;
}

FM_FUNCTION float fm_exp(float v) {
  return expf(v);
}

FM_FUNCTION float fm_log(float v) {
  return logf(v);
}

FM_FUNCTION float fm_rsqrt(float v) {
  return rsqrtf(v);
}

FM_FUNCTION float fm_sum(float v) {
  FM_UNROLL for (int step = 16; step > 0; step /= 2) { v += __shfl_xor_sync(0xffffffffu, v, step); }
  return v;
}

#define fm_barrier() __syncthreads()

// Bits 0-3 and 16-19 of a word as two bfloat16, each 128 more: the end of a mantissa whose unit is 1.
FM_FUNCTION unsigned fm_pair(unsigned word) {
  unsigned pair;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(pair) : "r"(word), "r"(0x000f000fu), "r"(0x43004300u));
  return pair;
}

// c [16, 8] += a [16, 16] * b [16, 8], spread over a warp as PTX says for mma.m16n8k16.
FM_FUNCTION void fm_mma(
    float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
