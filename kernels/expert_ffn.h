// The expert feed-forward, one text for Metal and CUDA. prelude.metal and prelude.cuh define what differs:
// address spaces (FM_DEVICE, FM_SHARED, FM_LOCAL), FM_FUNCTION, fm_load (a read of weights), fm_field (bits of a
// word to float), fm_half_pair, fm_bits_to_float, fm_sum (over the 32 lanes, in all of them) and fm_barrier.
// gpu.py writes, before this text: the structs Gate, Up and Down, which say where a matrix lies in a blob, and
// the constants FORMULATION (NAIVE, FMA or GROUPED), HIDDEN, INTERMEDIATE, TOP_K, SIMDGROUPS and the tile sizes.
//
// Everything works on chunks of 32 consecutive inputs of a weight row: the largest piece that lies in one
// group whatever the group size, and a whole number of words whatever the bits. One lane takes one chunk.

enum : unsigned { CHUNK = 32, LANES = 32, SPAN = CHUNK * LANES };  // a SPAN: one chunk for each lane

// Where element i of a vector is kept so that lanes reading their own chunks, four floats at a time, read
// neighbouring addresses (device memory) and different banks (threadgroup memory), and so does staging.
FM_FUNCTION unsigned place(unsigned i) {
  const unsigned lane = (i / CHUNK) % LANES, quad = (i / 4) % 8;
  return i / SPAN * SPAN + quad * 128 + (lane ^ quad) * 4 + i % 4;
}

// The same for quad `quad` of the chunk of `lane`, counted in float4 from the span's start.
FM_FUNCTION unsigned place_of_quad(unsigned lane, unsigned quad) {
  return quad * 32 + (lane ^ quad);
}

// One chunk of one row of the matrix M, as it lies in the blob.
template <typename M>
struct Packed {
  unsigned words[M::words];
  float scale;
  float bias;
};

template <typename M>
FM_FUNCTION void read_chunk(
    const FM_DEVICE unsigned char* blob, unsigned row, unsigned chunk, FM_LOCAL Packed<M>& to) {
  const FM_DEVICE unsigned* words =
      (const FM_DEVICE unsigned*)(blob + M::weight) + row * M::row_words + chunk * M::words;
  if (M::words % 4 == 0) {
    FM_UNROLL for (unsigned i = 0; i < M::words / 4; ++i) {
      const uint4 v = fm_load((const FM_DEVICE uint4*)words + i);
      to.words[4 * i] = v.x;
      to.words[4 * i + 1] = v.y;
      to.words[4 * i + 2] = v.z;
      to.words[4 * i + 3] = v.w;
    }
  } else if (M::words % 2 == 0) {
    FM_UNROLL for (unsigned i = 0; i < M::words / 2; ++i) {
      const uint2 v = fm_load((const FM_DEVICE uint2*)words + i);
      to.words[2 * i] = v.x;
      to.words[2 * i + 1] = v.y;
    }
  } else {
    FM_UNROLL for (unsigned i = 0; i < M::words; ++i) { to.words[i] = fm_load(words + i); }
  }
  if (M::quantized) {
    typedef typename M::Scale Scale;
    const unsigned group = row * M::groups + chunk * CHUNK / M::group_size;
    to.scale = float(fm_load((const FM_DEVICE Scale*)(blob + M::scales) + group));
    to.bias = float(fm_load((const FM_DEVICE Scale*)(blob + M::biases) + group));
  }
}

// Value i of a chunk: the integer q if M is quantized, else the weight itself.
template <typename M>
FM_FUNCTION float value(const FM_LOCAL Packed<M>& chunk, unsigned i) {
  if (M::quantized) {
    const unsigned word = i * M::bits / 32, shift = i * M::bits % 32;
    if (shift + M::bits > 32) {  // 3 and 6 bits: values straddle words
      return fm_field<M::bits>(chunk.words[word] >> shift | chunk.words[word + 1] << (32 - shift), 0);
    }
    return fm_field<M::bits>(chunk.words[word], shift);
  }
  if (M::is_float32) {
    return fm_bits_to_float(chunk.words[i]);
  }
  if (M::is_bfloat16) {
    return fm_bits_to_float(i % 2 ? chunk.words[i / 2] & 0xffff0000u : chunk.words[i / 2] << 16);
  }
  return fm_half_pair(chunk.words[i / 2], i % 2);
}

// Value i of a chunk, dequantized.
template <typename M>
FM_FUNCTION float weight(const FM_LOCAL Packed<M>& chunk, unsigned i) {
  return M::quantized ? fma(value(chunk, i), chunk.scale, chunk.bias) : value(chunk, i);
}

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

FM_FUNCTION float silu(float v) {
  const float e = fm_exp(-fabs(v));  // never above 1: no infinity on the way
  return v * ((v >= 0 ? 1.0f : e) / (1.0f + e));
}

// Launch 1 of 2, decode. One threadgroup: SIMDGROUPS * GATE_ROWS rows of gate and of up, for one (token, k).
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
  const unsigned first = (group * SIMDGROUPS + simdgroup) * GATE_ROWS;
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
    for (unsigned i = simdgroup * LANES + lane; i < count * CHUNK; i += SIMDGROUPS * LANES) {
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

// Launch 2 of 2, decode. One threadgroup: SIMDGROUPS * DOWN_ROWS outputs of one token, over all its experts.
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
  const unsigned first = (group * SIMDGROUPS + simdgroup) * DOWN_ROWS;
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
    for (unsigned i = simdgroup * LANES + lane; i < quads; i += SIMDGROUPS * LANES) {
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

// Launch 1 of 2, rows. One threadgroup: SIMDGROUPS * PAIR rows of gate and of up, for the tile's rows.
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
  const unsigned first = (group * SIMDGROUPS + simdgroup) * PAIR;
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
      for (unsigned i = simdgroup * LANES + lane; i < width; i += SIMDGROUPS * LANES) {
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

// Launch 2 of 2, rows. One threadgroup: SIMDGROUPS * 2 * PAIR outputs of the tile's rows.
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
  const unsigned first = (group * SIMDGROUPS + simdgroup) * 2 * PAIR;
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
    for (unsigned i = simdgroup * LANES + lane; i < count * (SPAN / 4); i += SIMDGROUPS * LANES) {
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
