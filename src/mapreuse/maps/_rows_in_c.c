/* Softmax of the sum of two blocks of scores, row by row while a row is in the first-level cache.

       out[h, i, :] = softmax(scores[h, i, :] + addend[h, i, :])

   Strides are in floats, keys are adjacent. `addend` may be null. `scores` and `out` may be the same memory. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
/* One copy of the function for each generation of processors; the newest that the machine has is taken at load. */
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

/* e^x for x <= 0: 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor polynomial of degree 7 (relative error 1e-8),
   zero below the least normal number. NaN stays NaN. */
static inline float exp_of_negative(float x)
{
    float n = x * 1.44269504f;
    n = (n + 12582912.0f) - 12582912.0f; /* rounds to an integer: 1.5 * 2^23 leaves no bits for a fraction */
    float r = x - n * 0.693145752f;      /* ln 2 in two parts, so that n times the first is exact */
    r -= n * 1.42860677e-6f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

FOR_EVERY_PROCESSOR
static void one_row(const float *scores, const float *addend, float *out, int64_t keys)
{
    float most = -__builtin_inff();
    if (addend) {
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < keys; j++) {
            float score = scores[j] + addend[j];
            out[j] = score;
            most = score > most ? score : most;
        }
    } else {
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < keys; j++)
            most = scores[j] > most ? scores[j] : most;
        if (out != scores)
            memcpy(out, scores, keys * sizeof *out);
    }
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < keys; j++) {
        float weight = exp_of_negative(out[j] - most);
        out[j] = weight;
        sum += weight;
    }
    float scale = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < keys; j++)
        out[j] *= scale;
}

void mapreuse_softmax_of_sum(const float *scores, const int64_t *scores_strides, const float *addend,
                             const int64_t *addend_strides, float *out, const int64_t *out_strides, int64_t heads,
                             int64_t rows, int64_t keys)
{
#pragma omp parallel for schedule(static)
    for (int64_t item = 0; item < heads * rows; item++) {
        int64_t head = item / rows, row = item % rows;
        one_row(scores + head * scores_strides[0] + row * scores_strides[1],
                addend ? addend + head * addend_strides[0] + row * addend_strides[1] : 0,
                out + head * out_strides[0] + row * out_strides[1], keys);
    }
}
