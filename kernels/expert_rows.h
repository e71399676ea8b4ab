// Prefill: rows grouped by expert. After expert_common.h.

// The grouped path: `count` (up to TILE) rows of x share one expert, whose weights are dequantized once.

// total[m][r] += chunk m times x row r, for PAIR chunks of A and PAIR of B. staged: [TILE][SPAN].
template <typename A, typename B>
FM_FUNCTION void accumulate(
    const FM_LOCAL Packed<A>* a,
    const FM_LOCAL Packed<B>* b,
    const FM_SHARED float* staged,
    unsigned count,
    unsigned lane,
    FM_LOCAL float* total) {
  FM_UNROLL for (unsigned part = 0; part < 2; ++part) {
    float w[2 * PAIR][CHUNK / 2];
    FM_UNROLL for (unsigned m = 0; m < PAIR; ++m) {
      FM_UNROLL for (unsigned i = 0; i < CHUNK / 2; ++i) {
        w[m][i] = weight(a[m], part * CHUNK / 2 + i);
        w[PAIR + m][i] = weight(b[m], part * CHUNK / 2 + i);
      }
    }
    FM_UNROLL for (unsigned r = 0; r < TILE; ++r) {
      if (r < count) {
        FM_UNROLL for (unsigned quad = 0; quad < 4; ++quad) {
          const float4 v =
              ((const FM_SHARED float4*)(staged + r * SPAN))[place_of_quad(lane, part * 4 + quad)];
          FM_UNROLL for (unsigned m = 0; m < 2 * PAIR; ++m) {
            float t = total[m * TILE + r];
            t = fma(w[m][4 * quad], v.x, t);
            t = fma(w[m][4 * quad + 1], v.y, t);
            t = fma(w[m][4 * quad + 2], v.z, t);
            total[m * TILE + r] = fma(w[m][4 * quad + 3], v.w, t);
          }
        }
      }
    }
  }
}

// Launch 1 of 2, rows. One threadgroup: ROWS_SIMDGROUPS * PAIR rows of gate and of up, for the tile's rows.
// x: the tile's [count, HIDDEN]; h: the tile's [count, H_ROW], each row kept at place(); staged [TILE * SPAN].
template <typename T>
FM_FUNCTION void rows_gate_up(
    const FM_DEVICE T* x,
    const FM_DEVICE unsigned char* blob,
    unsigned count,
    FM_DEVICE float* h,
    FM_SHARED float* staged,
    unsigned group,
    unsigned simdgroup,
    unsigned lane) {
  const unsigned chunks = HIDDEN / CHUNK;
  const unsigned first = (group * ROWS_SIMDGROUPS + simdgroup) * PAIR;
  float total[2 * PAIR * TILE];
  unsigned rows[PAIR];
  Packed<Gate> gates[PAIR], next_gates[PAIR];
  Packed<Up> ups[PAIR], next_ups[PAIR];
  FM_UNROLL for (unsigned i = 0; i < 2 * PAIR * TILE; ++i) { total[i] = 0; }
  FM_UNROLL for (unsigned m = 0; m < PAIR; ++m) {
    rows[m] = fm_min(first + m, INTERMEDIATE - 1);
    read_chunk(blob, rows[m], fm_min(lane, chunks - 1), next_gates[m]);
    read_chunk(blob, rows[m], fm_min(lane, chunks - 1), next_ups[m]);
  }
  for (unsigned base = 0; base < chunks; base += LANES) {
    const unsigned width = fm_min(chunks - base, LANES) * CHUNK;
    if (base > 0) {
      fm_barrier();
    }
    for (unsigned r = 0; r < count; ++r) {
      for (unsigned i = simdgroup * LANES + lane; i < width; i += ROWS_SIMDGROUPS * LANES) {
        staged[r * SPAN + place(i)] = float(x[size_t(r) * HIDDEN + base * CHUNK + i]);
      }
    }
    fm_barrier();
    const unsigned ahead = fm_min(base + lane + LANES, chunks - 1);
    FM_UNROLL for (unsigned m = 0; m < PAIR; ++m) {
      gates[m] = next_gates[m];
      ups[m] = next_ups[m];
      read_chunk(blob, rows[m], ahead, next_gates[m]);
      read_chunk(blob, rows[m], ahead, next_ups[m]);
    }
    if (base + lane < chunks) {
      accumulate(gates, ups, staged, count, lane, total);
    }
  }
  FM_UNROLL for (unsigned m = 0; m < PAIR; ++m) {
    FM_UNROLL for (unsigned r = 0; r < TILE; ++r) {
      if (r < count) {
        const float g = fm_sum(total[m * TILE + r]), u = fm_sum(total[(PAIR + m) * TILE + r]);
        if (lane == 0 && first + m < INTERMEDIATE) {
          h[size_t(r) * H_ROW + place(first + m)] = silu(g) * u;
        }
      }
    }
  }
}

// Launch 2 of 2, rows. One threadgroup: ROWS_SIMDGROUPS * 2 * PAIR outputs of the tile's rows.
template <typename T>
FM_FUNCTION void rows_down(
    const FM_DEVICE float* h,
    const FM_DEVICE unsigned char* blob,
    unsigned count,
    FM_DEVICE T* y,
    FM_SHARED float* staged,
    unsigned group,
    unsigned simdgroup,
    unsigned lane) {
  const unsigned chunks = INTERMEDIATE / CHUNK;
  const unsigned first = (group * ROWS_SIMDGROUPS + simdgroup) * 2 * PAIR;
  float total[2 * PAIR * TILE];
  unsigned rows[2 * PAIR];
  Packed<Down> downs[2 * PAIR], next_downs[2 * PAIR];
  FM_UNROLL for (unsigned i = 0; i < 2 * PAIR * TILE; ++i) { total[i] = 0; }
  FM_UNROLL for (unsigned m = 0; m < 2 * PAIR; ++m) {
    rows[m] = fm_min(first + m, HIDDEN - 1);
    read_chunk(blob, rows[m], fm_min(lane, chunks - 1), next_downs[m]);
  }
  for (unsigned base = 0; base < chunks; base += LANES) {
    if (base > 0) {
      fm_barrier();
    }
    for (unsigned i = simdgroup * LANES + lane; i < count * (SPAN / 4); i += ROWS_SIMDGROUPS * LANES) {
      const unsigned r = i / (SPAN / 4);
      ((FM_SHARED float4*)staged)[i] =
          ((const FM_DEVICE float4*)(h + size_t(r) * H_ROW + base * CHUNK))[i % (SPAN / 4)];
    }
    fm_barrier();
    const unsigned ahead = fm_min(base + lane + LANES, chunks - 1);
    FM_UNROLL for (unsigned m = 0; m < 2 * PAIR; ++m) {
      downs[m] = next_downs[m];
      read_chunk(blob, rows[m], ahead, next_downs[m]);
    }
    if (base + lane < chunks) {
      accumulate(downs, downs + PAIR, staged, count, lane, total);
    }
  }
  FM_UNROLL for (unsigned m = 0; m < 2 * PAIR; ++m) {
    FM_UNROLL for (unsigned r = 0; r < TILE; ++r) {
      if (r < count) {
        const float out = fm_sum(total[m * TILE + r]);
        if (lane == 0 && first + m < HIDDEN) {
          y[size_t(r) * HIDDEN + first + m] = T(out);
        }
      }
    }
  }
}
