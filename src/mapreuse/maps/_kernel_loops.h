/* The inner loops of _kernel.c for one instruction set. _kernel.c includes this file once per set, with these macros,
   which it undefines at its end:

       NAME(x)   name of the function x for this set
       TARGET    attribute that enables the instructions
       LANES     floats per vector
       VECTORS   vectors per row of a tile; the sums of its ROWS rows stay in registers
       STREAM    optional: stores a vector without filling the caches */

#define WIDTH (LANES * VECTORS)

typedef float NAME(vector) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* sums[r][:] = sum over k < depth of rows[r][k] * columns[k][:], with one packed panel of columns. Prefetches the rows
   `ahead` elements further, unless that is 0. */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(const float *const rows[ROWS],
                                                                    const float *columns, int64_t depth, int64_t ahead,
                                                                    NAME(vector) sums[ROWS][VECTORS])
{
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            sums[r][v] = (NAME(vector)){0};
    for (int64_t k = 0; k < depth; k++, columns += WIDTH) {
        if (ahead && k % 16 == 0)
            for (int r = 0; r < ROWS; r++)
                __builtin_prefetch(rows[r] + k + ahead, 0, 2);
        NAME(vector) column[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            column[v] = *(const NAME(vector) *)(columns + v * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] += column[v] * rows[r][k];
    }
}

/* scores[i][place + i * slant + c] = query[i] . column c of the packed keys, or += if `add`, for all panels that overlap
   columns 0 ... keys - 1 of some row. Relative positions use a slant of 1: each row starts one column after the row
   before it. Columns outside the scores fall into the margins. */
TARGET static void NAME(products)(const float *query, int64_t num_rows, int64_t dim, const float *packed,
                                  int64_t num_panels, float *scores, int64_t stride, int64_t place, int64_t slant,
                                  int64_t keys, int add)
{
    for (int64_t panel = 0; panel < num_panels; panel++) {
        const float *columns = packed + panel * dim * WIDTH;
        for (int64_t first = 0; first < num_rows; first += ROWS) {
            int64_t count = num_rows - first < ROWS ? num_rows - first : ROWS;
            int64_t start = place + panel * WIDTH + first * slant;
            if (start >= keys || start + (count - 1) * slant + WIDTH <= 0)
                continue;
            const float *rows[ROWS];
            for (int64_t r = 0; r < ROWS; r++)
                rows[r] = query + (first + (r < count ? r : count - 1)) * dim;
            NAME(vector) sums[ROWS][VECTORS];
            NAME(tile)(rows, columns, dim, 0, sums);
            for (int r = 0; r < ROWS; r++) {
                if (r >= count)
                    break;
                float *out = scores + (first + r) * stride + start + r * slant;
                for (int v = 0; v < VECTORS; v++) {
                    NAME(vector) *at = (NAME(vector) *)(out + v * LANES);
                    if (add)
                        sums[r][v] += *at;
                    *at = sums[r][v];
                }
            }
        }
    }
}

/* context[i][:] += sum over k < depth of weights[i][k] * values[k][:], or = if `is_first`, with one packed panel. */
TARGET static void NAME(contexts)(const float *weights, int64_t stride, int64_t num_rows, const float *values,
                                  int64_t depth, float *context, int64_t context_stride, int is_first)
{
    for (int64_t first = 0; first < num_rows; first += ROWS) {
        int64_t count = num_rows - first < ROWS ? num_rows - first : ROWS;
        const float *rows[ROWS];
        for (int64_t r = 0; r < ROWS; r++)
            rows[r] = weights + (first + (r < count ? r : count - 1)) * stride;
        NAME(vector) sums[ROWS][VECTORS];
        NAME(tile)(rows, values, depth, DEPTH, sums);
        for (int r = 0; r < ROWS; r++) {
            if (r >= count)
                break;
            for (int v = 0; v < VECTORS; v++) {
                NAME(vector) *at = (NAME(vector) *)(context + (first + r) * context_stride + v * LANES);
                if (!is_first)
                    sums[r][v] += *at;
                *at = sums[r][v];
            }
        }
    }
}

/* row = e^(row + addend - maximum of row + addend); returns the sum. Keys that are not allowed become 0; without
   allowed keys, row and sum are 0. A NaN score makes the sum NaN, and so do allowed scores that are all -infinity. */
TARGET static float NAME(exponentials)(float *row, const float *addend, const uint8_t *allowed, int64_t keys)
{
    float maximum = -FLT_MAX;
    if (addend)
#pragma omp simd reduction(max : maximum)
        for (int64_t j = 0; j < keys; j++) {
            row[j] += addend[j];
            maximum = row[j] > maximum ? row[j] : maximum;
        }
    else
#pragma omp simd reduction(max : maximum)
        for (int64_t j = 0; j < keys; j++)
            maximum = row[j] > maximum ? row[j] : maximum;
    if (allowed) {
        maximum = -FLT_MAX;
#pragma omp simd reduction(max : maximum)
        for (int64_t j = 0; j < keys; j++) {
            row[j] = allowed[j] ? row[j] : -INFINITY;
            maximum = row[j] > maximum ? row[j] : maximum;
        }
    }
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < keys; j++) {
        float weight = exp_of_negative(row[j] - maximum);
        row[j] = weight;
        sum += weight;
    }
    if (sum == 0.0f) {
        int any_allowed = !allowed;
        for (int64_t j = 0; j < keys && !any_allowed; j++)
            any_allowed = allowed[j];
        return any_allowed ? NAN : sum;
    }
    return sum;
}

TARGET static void NAME(scale_row)(const float *row, float scale, float *out, int64_t count)
{
#pragma omp simd
    for (int64_t j = 0; j < count; j++)
        out[j] = row[j] * scale;
}

/* Raise `out` to the scaled row where that is larger. */
TARGET static void NAME(raise_to_row)(const float *row, float scale, float *out, int64_t count)
{
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
        float scaled = row[j] * scale;
        out[j] = scaled > out[j] ? scaled : out[j];
    }
}

/* `scale_row` without filling the caches, for memory that is read much later. */
TARGET static void NAME(scale_row_streaming)(const float *row, float scale, float *out, int64_t count)
{
    int64_t j = 0;
#ifdef STREAM
    for (; j < count && (uintptr_t)(out + j) % (LANES * sizeof *out); j++)
        out[j] = row[j] * scale;
    for (; j + LANES <= count; j += LANES)
        STREAM(out + j, *(const NAME(vector) *)(row + j) * scale);
#endif
    for (; j < count; j++)
        out[j] = row[j] * scale;
}

/* Store numbers from 0 to 1 as bytes from 0 to 255 (or, below, in half precision); returns the sum of the stored
   numbers. */
TARGET static float NAME(to_bytes)(const float *row, uint8_t *out, int64_t count)
{
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) {
        int32_t number = (int32_t)(row[j] * 255.0f + 0.5f);
        out[j] = (uint8_t)number;
        sum += number;
    }
    return (float)sum;
}

TARGET static void NAME(from_bytes)(const uint8_t *row, float *out, int64_t count)
{
#pragma omp simd
    for (int64_t j = 0; j < count; j++)
        out[j] = (float)row[j];
}

TARGET static float NAME(to_halves)(const float *row, uint16_t *out, int64_t count)
{
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) {
        uint16_t half = half_of(row[j]);
        out[j] = half;
        sum += float_of(half);
    }
    return sum;
}

TARGET static void NAME(from_halves)(const uint16_t *row, float *out, int64_t count)
{
#pragma omp simd
    for (int64_t j = 0; j < count; j++)
        out[j] = float_of(row[j]);
}

static const routines NAME(kernels) = {
    WIDTH,          NAME(products),   NAME(contexts),  NAME(exponentials), NAME(scale_row),
    NAME(scale_row_streaming), NAME(to_bytes), NAME(from_bytes), NAME(to_halves), NAME(from_halves),
    NAME(raise_to_row),
};

#undef WIDTH
#undef NAME
#undef TARGET
#undef LANES
#undef VECTORS
#undef STREAM
