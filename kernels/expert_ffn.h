// Decode: a few tokens, each with its own experts. After expert_common.h.

// A lane's part of a row times x. `sum` is the sum of x, which rows share.
template <typename M>
FM_FUNCTION float dot(const FM_LOCAL Packed<M>& chunk, const FM_LOCAL float* x, float sum, float total) {
  if (!M::quantized) {
    FM_UNROLL for (unsigned i = 0; i < CHUNK; ++i) { total = fma(value(chunk, i), x[i], total); }
    return total;
  }
  const float s = chunk.scale, b = chunk.bias;
  if (FORMULATION == NAIVE) {
    FM_UNROLL for (unsigned i = 0; i < CHUNK; ++i) { total += (value(chunk, i) * s + b) * x[i]; }
    return total;
  }
  if (FORMULATION == FMA) {
    FM_UNROLL for (unsigned i = 0; i < CHUNK; ++i) { total += fma(value(chunk, i), s * x[i], b * x[i]); }
    return total;
  }
  float products = 0;
  FM_UNROLL for (unsigned i = 0; i < CHUNK; ++i) { products = fma(value(chunk, i), x[i], products); }
  return fma(s, products, fma(b, sum, total));
}

// A lane's chunk of x, from a span staged in threadgroup memory; returns its sum.
FM_FUNCTION float read_x(const FM_SHARED float* span, unsigned lane, FM_LOCAL float* x) {
  float sum = 0;
  FM_UNROLL for (unsigned quad = 0; quad < 8; ++quad) {
    const float4 v = ((const FM_SHARED float4*)span)[place_of_quad(lane, quad)];
    x[4 * quad] = v.x;
    x[4 * quad + 1] = v.y;
    x[4 * quad + 2] = v.z;
    x[4 * quad + 3] = v.w;
    sum += (v.x + v.y) + (v.z + v.w);
  }
  return sum;
}

// Launch 1 of 2, decode. One threadgroup: GATE_SIMDGROUPS * GATE_ROWS rows of gate and of up, for one (token, k).
// x [HIDDEN] of the token; h: the token's [TOP_K * INTERMEDIATE], kept at place(); staged [GATE_SPANS * SPAN].
template <typename T>
FM_FUNCTION void gate_up(
    const FM_DEVICE T* x,
    const FM_DEVICE unsigned char* blob,
    unsigned k,
    FM_DEVICE float* h,
    FM_SHARED float* staged,
    unsigned group,
    unsigned simdgroup,
    unsigned lane) {
  const unsigned chunks = HIDDEN / CHUNK;
  const unsigned first = (group * GATE_SIMDGROUPS + simdgroup) * GATE_ROWS;
  float gate[GATE_ROWS], up[GATE_ROWS];
  unsigned rows[GATE_ROWS];
  Packed<Gate> gates[GATE_ROWS], next_gates[GATE_ROWS];
  Packed<Up> ups[GATE_ROWS], next_ups[GATE_ROWS];
  // Reads run one step ahead of the arithmetic; past the end they read the last row or chunk again.
  FM_UNROLL for (unsigned r = 0; r < GATE_ROWS; ++r) {
    gate[r] = up[r] = 0;
    rows[r] = fm_min(first + r, INTERMEDIATE - 1);
    read_chunk(blob, rows[r], fm_min(lane, chunks - 1), next_gates[r]);
    read_chunk(blob, rows[r], fm_min(lane, chunks - 1), next_ups[r]);
  }
  for (unsigned base = 0; base < chunks; base += GATE_SPANS * LANES) {
    const unsigned count = fm_min(chunks - base, GATE_SPANS * LANES);
    if (base > 0) {
      fm_barrier();
    }
    for (unsigned i = simdgroup * LANES + lane; i < count * CHUNK; i += GATE_SIMDGROUPS * LANES) {
      staged[place(i)] = float(x[base * CHUNK + i]);
    }
    fm_barrier();
    for (unsigned chunk = lane; chunk < count; chunk += LANES) {
      const unsigned ahead = fm_min(base + chunk + LANES, chunks - 1);
      FM_UNROLL for (unsigned r = 0; r < GATE_ROWS; ++r) {
        gates[r] = next_gates[r];
        ups[r] = next_ups[r];
        read_chunk(blob, rows[r], ahead, next_gates[r]);
        read_chunk(blob, rows[r], ahead, next_ups[r]);
      }
      float values[CHUNK];
      const float sum = read_x(staged + chunk / LANES * SPAN, lane, values);
      FM_UNROLL for (unsigned r = 0; r < GATE_ROWS; ++r) {
        gate[r] = dot(gates[r], values, sum, gate[r]);
        up[r] = dot(ups[r], values, sum, up[r]);
      }
    }
  }
  FM_UNROLL for (unsigned r = 0; r < GATE_ROWS; ++r) {
    const float g = fm_sum(gate[r]), u = fm_sum(up[r]);
    if (lane == 0 && first + r < INTERMEDIATE) {
      h[place(k * INTERMEDIATE + first + r)] = silu(g) * u;
    }
  }
}

// Launch 2 of 2, decode. One threadgroup: DOWN_SIMDGROUPS * DOWN_ROWS outputs of one token, over all its experts.
// The experts' chunks form one sequence of TOP_K * INTERMEDIATE / CHUNK, so that few inputs leave no lane idle.
// slots, weights: the token's, in threadgroup memory; staged [DOWN_SPANS * SPAN].
template <typename T>
FM_FUNCTION void down_combine(
    const FM_DEVICE float* h,
    const FM_DEVICE unsigned char* slab,
    const FM_SHARED int* slots,
    const FM_SHARED float* weights,
    FM_DEVICE T* y,
    FM_SHARED float* staged,
    unsigned group,
    unsigned simdgroup,
    unsigned lane) {
  const unsigned each = INTERMEDIATE / CHUNK, chunks = TOP_K * each;
  const unsigned first = (group * DOWN_SIMDGROUPS + simdgroup) * DOWN_ROWS;
  float total[DOWN_ROWS];
  unsigned rows[DOWN_ROWS];
  Packed<Down> downs[DOWN_ROWS], next_downs[DOWN_ROWS];
  const unsigned start = fm_min(lane, chunks - 1);
  const FM_DEVICE unsigned char* blob = slab + size_t(slots[start / each]) * BLOB_SIZE;
  FM_UNROLL for (unsigned r = 0; r < DOWN_ROWS; ++r) {
    total[r] = 0;
    rows[r] = fm_min(first + r, HIDDEN - 1);
    read_chunk(blob, rows[r], start % each, next_downs[r]);
  }
  for (unsigned base = 0; base < chunks; base += DOWN_SPANS * LANES) {
    const unsigned count = fm_min(chunks - base, DOWN_SPANS * LANES);
    const unsigned quads = (count + LANES - 1) / LANES * (SPAN / 4);
    if (base > 0) {
      fm_barrier();
    }
    for (unsigned i = simdgroup * LANES + lane; i < quads; i += DOWN_SIMDGROUPS * LANES) {
      ((FM_SHARED float4*)staged)[i] = ((const FM_DEVICE float4*)(h + base * CHUNK))[i];
    }
    fm_barrier();
    for (unsigned chunk = lane; chunk < count; chunk += LANES) {
      const unsigned ahead = fm_min(base + chunk + LANES, chunks - 1);
      blob = slab + size_t(slots[ahead / each]) * BLOB_SIZE;
      FM_UNROLL for (unsigned r = 0; r < DOWN_ROWS; ++r) {
        downs[r] = next_downs[r];
        read_chunk(blob, rows[r], ahead % each, next_downs[r]);
      }
      float values[CHUNK];
      const float sum = read_x(staged + chunk / LANES * SPAN, lane, values);
      const float share = weights[(base + chunk) / each];
      FM_UNROLL for (unsigned r = 0; r < DOWN_ROWS; ++r) {
        total[r] = fma(share, dot(downs[r], values, sum, 0.0f), total[r]);
      }
    }
  }
  FM_UNROLL for (unsigned r = 0; r < DOWN_ROWS; ++r) {
    const float out = fm_sum(total[r]);
    if (lane == 0 && first + r < HIDDEN) {
      y[first + r] = T(out);
    }
  }
}
