// What the kernels that work on rows of activations share: add_norm, gated_norm, delta_inputs and router.

// The sum over a threadgroup of `simdgroups`, in all its threads; `partial` holds one float for each SIMD group.
// Whoever sums twice with the same `partial` puts a barrier in between.
FM_FUNCTION float fm_total(
    float v, FM_SHARED float* partial, unsigned simdgroups, unsigned simdgroup, unsigned lane) {
  v = fm_sum(v);
  if (lane == 0) partial[simdgroup] = v;
  fm_barrier();
  float total = 0;
  for (unsigned i = 0; i < simdgroups; ++i) total += partial[i];
  return total;
}

FM_FUNCTION float fm_sigmoid(float v) {
  return 1 / (1 + fm_exp(-v));
}
