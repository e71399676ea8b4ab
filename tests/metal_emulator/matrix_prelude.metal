// What kernels/expert_mma.h needs beyond prelude.metal, to run the CUDA kernels' text in the emulation: the text and
// its indexing are checked, CUDA's own prelude (and its PTX) is not.

inline unsigned fm_pair(unsigned word) {
  return (word & 0x000f000fu) | 0x43004300u;
}

struct MatrixArguments {
  float* c;
  unsigned a[4], b[2];
};

inline float bfloat_of(unsigned pair, unsigned which) {
  return as_type<float>(which ? pair & 0xffff0000u : pair << 16);
}

// mma.m16n8k16 as the PTX manual gives it: which lane holds which element of a, b and c.
inline void fm_mma(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  MatrixArguments mine = {c, {a0, a1, a2, a3}, {b0, b1}};
  emulator::together(&mine, [](void** lanes) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < 32; ++lane) {
      const MatrixArguments& m = *static_cast<MatrixArguments*>(lanes[lane]);
      for (unsigned i = 0; i < 8; ++i) {
        const unsigned row = lane / 4 + (i / 2 % 2) * 8, column = lane % 4 * 2 + i % 2 + (i / 4) * 8;
        a[row][column] = bfloat_of(m.a[i / 2], i % 2);
      }
      for (unsigned i = 0; i < 4; ++i) {
        b[lane % 4 * 2 + i % 2 + (i / 2) * 8][lane / 4] = bfloat_of(m.b[i / 2], i % 2);
      }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = static_cast<MatrixArguments*>(lanes[lane])->c[i];
        for (unsigned k = 0; k < 16; ++k) {
          sum += a[row][k] * b[k][column];
        }
        static_cast<MatrixArguments*>(lanes[lane])->c[i] = sum;
      }
    }
  });
}
