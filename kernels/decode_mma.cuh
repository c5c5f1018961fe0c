#pragma once

#include <cuda_runtime.h>

namespace hestia {

constexpr int kMmaRows = 16;    // of the weights in a product of tensor cores
constexpr int kMmaColumns = 8;  // rows of the step in one

/// sum += a b: a 16 x 16 by rows, b 16 x 8 by columns, bfloat16; lane l holds of a rows l / 4 (a0, a2) and l / 4 + 8
/// (a1, a3), of b column l / 4, of sum those rows (0, 1 and 2, 3) in columns l % 4 * 2 and the next. Which 16 inputs
/// these are, and in which order, does not matter as long as a and b agree.
__device__ inline void multiply_add(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace hestia
