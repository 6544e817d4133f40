// What is asked of the kernels of cross_entropy.cuh, without PyTorch or CUDA in it.

#pragma once

#include <cstdint>

namespace deepy {

// What is made of the rows. losses: with their gradient. gradient: alone, from the m and z that are given.
enum class Kind { losses, statistics, gradient };

enum class Element { fp32, bf16, fp16 };

// What a launch works on. logits [rows, columns], each row contiguous and `stride` values after the one before. labels
// [rows] count from the column `first` of the vocabulary on; one that is not among the columns has no logit here.
// results: [rows] losses, or [3, rows] statistics: m, z and the label's logit, 0 where it has none here.
// maxima, totals: [rows] m and z, where the gradient alone is asked for. scale: of the gradient.
struct Request {
  void* logits;
  const int64_t* labels;
  float* results;
  const float* maxima;
  const float* totals;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  int64_t first;
  float scale;
};

// Starts a kernel in a stream, a cudaStream_t, of a device; raises std::runtime_error in CUDA's words where it cannot.
void start(Kind kind, Element element, const Request& request, int device, void* stream);

}  // namespace deepy
