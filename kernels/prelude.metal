// What the kernels need of Metal. The kernels' bodies (gpu.py) use MLX's names for the thread attributes.
#define FM_DEVICE device
#define FM_SHARED threadgroup
#define FM_ARRAY threadgroup
#define FM_LOCAL thread
#define FM_FUNCTION inline
#define FM_UNROLL _Pragma("clang loop unroll(full)")

typedef bfloat fm_bfloat16;
typedef half fm_float16;
typedef float fm_float32;

template <typename T>
FM_FUNCTION T fm_load(const device T* from) {
  return *from;
}

template <unsigned bits>
FM_FUNCTION float fm_field(unsigned word, unsigned shift) {
  return float(word >> shift & ((1u << bits) - 1));
}

FM_FUNCTION float fm_bits_to_float(unsigned bits) {
  return as_type<float>(bits);
}

FM_FUNCTION float fm_half_pair(unsigned word, unsigned which) {
  return float(as_type<half>((unsigned short)(word >> (16 * which))));
}

FM_FUNCTION unsigned fm_min(unsigned a, unsigned b) {
  return a < b ? a : b;
}

FM_FUNCTION float fm_exp(float v) {
  return metal::precise::exp(v);
}

FM_FUNCTION float fm_log(float v) {
  return metal::precise::log(v);
}

FM_FUNCTION float fm_rsqrt(float v) {
  return metal::precise::rsqrt(v);
}

FM_FUNCTION float fm_sum(float v) {
  return simd_sum(v);
}

#define fm_barrier() threadgroup_barrier(mem_flags::mem_threadgroup)
