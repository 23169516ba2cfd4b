// What is done to one row at a time: norms, rotary positions, embeddings, pooling. kernels/reference/rows.py is the
// definition. Every reduction has one order, whatever the instruction set: results are equal on all of them, bit for
// bit. Rows are float32 unless said otherwise, of any length from 1 and any alignment. Isa::baseline has no kernels:
// std::invalid_argument.
#pragma once

#include <cstdint>

#include "millrace/isa.h"
#include "millrace/matmul.h"

namespace millrace {

// out = weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467). out may be x. eps > 0; the sum
// of the squares must fit float32.
void rms_norm(const float* x, const float* weight, float eps, std::int32_t size, float* out, Isa isa);

// out = weight * (x - mean) / sqrt(variance + eps) + bias (Ba et al. 2016, arXiv:1607.06450). out may be x. eps > 0;
// the sum of the squares must fit float32.
void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::int32_t size, float* out,
                Isa isa);

// Cosine and sine of one position, [half] each, times `factor`, of the angles float(position) * frequencies, which are
// rounded to float32. Within 1 unit in the last place for angles up to 2^24, and the same on every machine.
void rotary_turns(std::int32_t position, const float* frequencies, float factor, std::int32_t half, float* cosine,
                  float* sine);

// Turns each of `heads` heads of `dim` in place: element i of the first half with element i of the second.
void rotate(float* x, std::int32_t heads, std::int32_t dim, const float* cosine, const float* sine, Isa isa);

// out = (accumulate ? out : 0) + row of stored numbers.
void embed_row(const void* row, Stored stored, std::int32_t size, bool accumulate, float* out, Isa isa);

// out += x, [size].
void add_row(const float* x, std::int32_t size, float* out, Isa isa);

// The mean of `rows` rows, at least 1, in ascending order, [size]. out overlaps none of them.
void mean_rows(const float* x, std::int64_t stride, std::int32_t rows, std::int32_t size, float* out, Isa isa);

// Divides by the Euclidean length, also where its square would not fit float32; zeros stay zeros.
void normalize(float* x, std::int32_t size, Isa isa);

// The elementary functions of the kernels, out = f(x): of activations, and e^x as attention takes it. out may be x.
void activate_row(Activation activation, const float* x, std::int32_t size, float* out, Isa isa);
void exp_row(const float* x, std::int32_t size, float* out, Isa isa);

}  // namespace millrace
