// The expert feed-forward, one text for Metal and CUDA. prelude.metal and prelude.cuh define what differs:
// address spaces (FM_DEVICE, FM_SHARED, FM_LOCAL), FM_FUNCTION, fm_load (a read of weights), fm_field (bits of a
// word to float), fm_half_pair, fm_bits_to_float, fm_sum (over the 32 lanes, in all of them) and fm_barrier.
// gpu.py writes, before this text: the structs Gate, Up and Down, which say where a matrix lies in a blob, and
// the constants FORMULATION (NAIVE, FMA or GROUPED), HIDDEN, INTERMEDIATE, TOP_K, and the tile sizes.
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

FM_FUNCTION float silu(float v) {
  const float e = fm_exp(-fabs(v));  // never above 1: no infinity on the way
  return v * ((v >= 0 ? 1.0f : e) / (1.0f + e));
}
