// 4-bit experts on bfloat16 activations with matrix instructions (CUDA's mma.m16n8k16). After expert_common.h.
//
// On a GPU with much bandwidth the plain kernels are bound by instructions: about four for each weight. Here a
// weight takes less than two. Integers up to 15 are exact in bfloat16, so q times x is exact, sums are float32,
// and scale and bias are applied to each group's sums. Sixteen rows of a matrix meet eight columns: in prefill
// eight rows of x, in decode one, because an instruction costs the same. h goes from launch to launch as two
// bfloat16, the second what the first leaves of it: 16 bits of mantissa.
//
// What each of the 32 lanes holds of rows, columns and sums is the instruction's business: lane / 4 is a row (and
// a row + 8) of A and a column of B, lane % 4 a quarter of the group, and 2 * (lane % 4) + 0, 1 columns of sums.
// Columns that nobody needs repeat another: what they give is not looked at.

enum : unsigned { AHEAD = 4, PANEL = 16, COLUMNS = 8 };  // groups read before the first is used; rows; columns

// A lane's part of one group of a panel of rows: a quarter of the group, of two rows.
template <typename M>
struct Quarter {
  unsigned words[2][M::group_size / 32];
  typename M::Scale scale[2];
  typename M::Scale bias[2];
};

template <typename M>
FM_FUNCTION void read_quarter(
    const FM_DEVICE unsigned char* blob,
    unsigned first,
    unsigned group,
    unsigned lane,
    FM_LOCAL Quarter<M>& to) {
  typedef typename M::Scale Scale;
  FM_UNROLL for (unsigned i = 0; i < 2; ++i) {
    const unsigned row = fm_min(first + lane / 4 + 8 * i, M::rows - 1);
    const FM_DEVICE unsigned* words = (const FM_DEVICE unsigned*)(blob + M::weight) + row * M::row_words +
        (group * 4 + lane % 4) * (M::group_size / 32);
    if (M::group_size == 32) {
      to.words[i][0] = fm_load(words);
    } else {
      FM_UNROLL for (unsigned w = 0; w < M::group_size / 64; ++w) {
        const uint2 v = fm_load((const FM_DEVICE uint2*)words + w);
        to.words[i][2 * w] = v.x;
        to.words[i][2 * w + 1] = v.y;
      }
    }
    to.scale[i] = fm_load((const FM_DEVICE Scale*)(blob + M::scales) + row * M::groups + group);
    to.bias[i] = fm_load((const FM_DEVICE Scale*)(blob + M::biases) + row * M::groups + group);
  }
}

// A lane's part of one group of its column, in the order in which fm_pair takes integers out of a word.
template <unsigned group_size>
struct Column {
  unsigned pairs[group_size / 8];
};

template <unsigned group_size>
FM_FUNCTION void read_column(
    const FM_DEVICE fm_bfloat16* x, unsigned group, unsigned lane, FM_LOCAL Column<group_size>& to) {
  FM_UNROLL for (unsigned w = 0; w < group_size / 32; ++w) {
    const uint4 v =
        *((const FM_DEVICE uint4*)(x + group * group_size) + (lane % 4) * (group_size / 32) + w);
    to.pairs[4 * w] = (v.x & 0xffffu) | v.z << 16;
    to.pairs[4 * w + 1] = v.x >> 16 | (v.z & 0xffff0000u);
    to.pairs[4 * w + 2] = (v.y & 0xffffu) | v.w << 16;
    to.pairs[4 * w + 3] = v.y >> 16 | (v.w & 0xffff0000u);
  }
}

// The columns' sums over the group, in every row: a matrix of ones in the place of the integers.
template <unsigned group_size>
FM_FUNCTION void add_up(const FM_LOCAL Column<group_size>& column, FM_LOCAL float* sums) {
  const unsigned ones = 0x3f803f80u;
  FM_UNROLL for (unsigned i = 0; i < group_size / 8; i += 2) {
    fm_mma(sums, ones, ones, ones, ones, column.pairs[i], column.pairs[i + 1]);
  }
}

// products += (128 + integers) times columns.
template <typename M>
FM_FUNCTION void multiply(
    const FM_LOCAL Quarter<M>& quarter, const FM_LOCAL Column<M::group_size>& column, FM_LOCAL float* products) {
  FM_UNROLL for (unsigned w = 0; w < M::group_size / 32; ++w) {
    FM_UNROLL for (unsigned i = 0; i < 2; ++i) {
      const unsigned a = quarter.words[0][w] >> (8 * i), b = quarter.words[1][w] >> (8 * i);
      fm_mma(
          products,
          fm_pair(a),
          fm_pair(b),
          fm_pair(a >> 4),
          fm_pair(b >> 4),
          column.pairs[4 * w + 2 * i],
          column.pairs[4 * w + 2 * i + 1]);
    }
  }
}

// total += share * (scale * products of the integers + bias * sums)
template <typename M>
FM_FUNCTION void apply(
    const FM_LOCAL Quarter<M>& quarter,
    const FM_LOCAL float* products,
    const FM_LOCAL float* sums,
    float share,
    FM_LOCAL float* total) {
  FM_UNROLL for (unsigned i = 0; i < 2; ++i) {
    const float s = share * float(quarter.scale[i]);
    const float b = fma(-128.0f, s, share * float(quarter.bias[i]));
    total[2 * i] = fma(s, products[2 * i], fma(b, sums[0], total[2 * i]));
    total[2 * i + 1] = fma(s, products[2 * i + 1], fma(b, sums[1], total[2 * i + 1]));
  }
}

FM_FUNCTION void clear(FM_LOCAL float* four) {
  four[0] = four[1] = four[2] = four[3] = 0;
}

// A value as two bfloat16, `apart` elements from each other.
FM_FUNCTION void write_h(FM_DEVICE fm_bfloat16* h, size_t apart, float v) {
  const fm_bfloat16 high = fm_bfloat16(v);
  h[0] = high;
  h[apart] = fm_bfloat16(v - float(high));
}

// The groups `start`, `start + 1` … of every `step` of gate and up, times x's columns.
FM_FUNCTION void mma_gate_up(
    const FM_DEVICE fm_bfloat16* x,
    const FM_DEVICE unsigned char* blob,
    unsigned first,
    unsigned start,
    unsigned step,
    unsigned lane,
    FM_LOCAL float* gate,
    FM_LOCAL float* up) {
  const unsigned groups = Gate::groups;
  for (unsigned base = start; base < groups; base += step) {
    Quarter<Gate> gates[AHEAD];
    Quarter<Up> ups[AHEAD];
    Column<Gate::group_size> columns[AHEAD];
    FM_UNROLL for (unsigned i = 0; i < AHEAD; ++i) {
      const unsigned group = fm_min(base + i, groups - 1);
      read_quarter(blob, first, group, lane, gates[i]);
      read_quarter(blob, first, group, lane, ups[i]);
      read_column(x, group, lane, columns[i]);
    }
    FM_UNROLL for (unsigned i = 0; i < AHEAD; ++i) {
      if (base + i < groups) {
        float sums[4], products[4];
        clear(sums);
        add_up(columns[i], sums);
        clear(products);
        multiply(gates[i], columns[i], products);
        apply(gates[i], products, sums, 1.0f, gate);
        clear(products);
        multiply(ups[i], columns[i], products);
        apply(ups[i], products, sums, 1.0f, up);
      }
    }
  }
}

// Launch 1 of 2, decode. One threadgroup: a panel of gate and of up for one (token, k); SIMD groups share the
// groups of the inputs. partial [8 * LANES * MATRIX_GATE_SIMDGROUPS]. h: the token's [2, TOP_K * INTERMEDIATE].
FM_FUNCTION void ffn_gate_up(
    const FM_DEVICE fm_bfloat16* x,
    const FM_DEVICE unsigned char* blob,
    unsigned k,
    FM_DEVICE fm_bfloat16* h,
    FM_SHARED float* partial,
    unsigned group,
    unsigned simdgroup,
    unsigned lane) {
  float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  const unsigned first = group * PANEL;
  mma_gate_up(x, blob, first, simdgroup * AHEAD, MATRIX_GATE_SIMDGROUPS * AHEAD, lane, total, total + 4);
  FM_UNROLL for (unsigned i = 0; i < 8; ++i) { partial[(simdgroup * 8 + i) * LANES + lane] = total[i]; }
  fm_barrier();
  if (simdgroup == 0 && lane % 4 == 0) {
    FM_UNROLL for (unsigned i = 0; i < 2; ++i) {
      float g = 0, u = 0;
      for (unsigned from = 0; from < MATRIX_GATE_SIMDGROUPS; ++from) {
        g += partial[(from * 8 + 2 * i) * LANES + lane];
        u += partial[(from * 8 + 4 + 2 * i) * LANES + lane];
      }
      const unsigned row = first + lane / 4 + 8 * i;
      if (row < INTERMEDIATE) {
        write_h(h + k * INTERMEDIATE + row, TOP_K * INTERMEDIATE, silu(g) * u);
      }
    }
  }
}

// Launch 2 of 2, decode. One threadgroup: a panel of down for one token, over all its experts. Two columns: the
// two parts of h. partial [4 * LANES * MATRIX_DOWN_SIMDGROUPS].
FM_FUNCTION void ffn_down(
    const FM_DEVICE fm_bfloat16* h,
    const FM_DEVICE unsigned char* slab,
    const FM_SHARED int* slots,
    const FM_SHARED float* weights,
    FM_DEVICE fm_bfloat16* y,
    FM_SHARED float* partial,
    unsigned group,
    unsigned simdgroup,
    unsigned lane) {
  const unsigned each = Down::groups, groups = TOP_K * each;
  const unsigned first = group * PANEL;
  float total[4];
  clear(total);
  for (unsigned base = simdgroup * AHEAD; base < groups; base += MATRIX_DOWN_SIMDGROUPS * AHEAD) {
    Quarter<Down> downs[AHEAD];
    Column<Down::group_size> columns[AHEAD];
    FM_UNROLL for (unsigned i = 0; i < AHEAD; ++i) {
      const unsigned at = fm_min(base + i, groups - 1);
      read_quarter(slab + size_t(slots[at / each]) * BLOB_SIZE, first, at % each, lane, downs[i]);
      read_column(h + (lane / 4 % 2) * (TOP_K * INTERMEDIATE), at, lane, columns[i]);
    }
    FM_UNROLL for (unsigned i = 0; i < AHEAD; ++i) {
      if (base + i < groups) {
        float sums[4], products[4];
        clear(sums);
        add_up(columns[i], sums);
        clear(products);
        multiply(downs[i], columns[i], products);
        apply(downs[i], products, sums, weights[(base + i) / each], total);
      }
    }
  }
  FM_UNROLL for (unsigned i = 0; i < 4; ++i) { partial[(simdgroup * 4 + i) * LANES + lane] = total[i]; }
  fm_barrier();
  if (simdgroup == 0 && lane % 4 == 0) {
    FM_UNROLL for (unsigned i = 0; i < 2; ++i) {
      float out = 0;
      for (unsigned from = 0; from < MATRIX_DOWN_SIMDGROUPS; ++from) {
        out += partial[(from * 4 + 2 * i) * LANES + lane] + partial[(from * 4 + 2 * i + 1) * LANES + lane];
      }
      const unsigned row = first + lane / 4 + 8 * i;
      if (row < HIDDEN) {
        y[row] = fm_bfloat16(out);
      }
    }
  }
}

// Launch 1 of 2, rows. One SIMD group: a panel of gate and of up for a tile of up to COLUMNS rows of x.
// x: the tile's [count, HIDDEN]; h: the tile's [count, 2, INTERMEDIATE].
FM_FUNCTION void rows_gate_up(
    const FM_DEVICE fm_bfloat16* x,
    const FM_DEVICE unsigned char* blob,
    unsigned count,
    FM_DEVICE fm_bfloat16* h,
    unsigned panel,
    unsigned lane) {
  float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  const unsigned column = fm_min(lane / 4, count - 1);
  mma_gate_up(x + size_t(column) * HIDDEN, blob, panel * PANEL, 0, AHEAD, lane, total, total + 4);
  FM_UNROLL for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = panel * PANEL + lane / 4 + 8 * (i / 2), of = 2 * (lane % 4) + i % 2;
    if (row < INTERMEDIATE && of < count) {
      write_h(h + size_t(of) * (2 * INTERMEDIATE) + row, INTERMEDIATE, silu(total[i]) * total[4 + i]);
    }
  }
}

// Launch 2 of 2, rows. One SIMD group: a panel of down for the tile's rows.
FM_FUNCTION void rows_down(
    const FM_DEVICE fm_bfloat16* h,
    const FM_DEVICE unsigned char* blob,
    unsigned count,
    FM_DEVICE fm_bfloat16* y,
    unsigned panel,
    unsigned lane) {
  const unsigned groups = Down::groups, column = fm_min(lane / 4, count - 1);
  const FM_DEVICE fm_bfloat16* mine = h + size_t(column) * (2 * INTERMEDIATE);
  float total[4];
  clear(total);
  for (unsigned base = 0; base < groups; base += AHEAD) {
    Quarter<Down> downs[AHEAD];
    Column<Down::group_size> high[AHEAD], low[AHEAD];
    FM_UNROLL for (unsigned i = 0; i < AHEAD; ++i) {
      const unsigned group = fm_min(base + i, groups - 1);
      read_quarter(blob, panel * PANEL, group, lane, downs[i]);
      read_column(mine, group, lane, high[i]);
      read_column(mine + INTERMEDIATE, group, lane, low[i]);
    }
    FM_UNROLL for (unsigned i = 0; i < AHEAD; ++i) {
      if (base + i < groups) {
        float sums[4], products[4];
        clear(sums);
        add_up(high[i], sums);
        add_up(low[i], sums);
        clear(products);
        multiply(downs[i], high[i], products);
        multiply(downs[i], low[i], products);
        apply(downs[i], products, sums, 1.0f, total);
      }
    }
  }
  FM_UNROLL for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = panel * PANEL + lane / 4 + 8 * (i / 2), of = 2 * (lane % 4) + i % 2;
    if (row < HIDDEN && of < count) {
      y[size_t(of) * HIDDEN + row] = fm_bfloat16(total[i]);
    }
  }
}
