/* Exact attention of one item of a batch. A thread takes a few rows of a head through scores, softmax and context, so
   that their scores stay in the cache of its processor core.

   All numbers are floats, the last axis of every matrix is contiguous, and strides count elements. Before a product,
   its right-hand matrix is packed into panels: blocks of as many columns as a tile has, stored row by row. */

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "_kernel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define MAX_WIDTH 64  /* columns of the widest panel */
#define ROWS 6        /* rows of a tile */
#define MARGIN 80     /* columns before and after a row of scores that slanted tiles may write to */
#define DEPTH 128     /* number of keys whose values fit into the first-level cache */

_Static_assert(MARGIN >= MAX_WIDTH + ROWS - 1, "a tile that overlaps a row starts at most this far before it");

/* e^x for x <= 0, as 2^n e^r with |r| <= ln(2) / 2; e^r is a Taylor polynomial of degree 6 (relative error 2e-7).
   Results below the smallest normal number are zero. NaN stays NaN. */
static inline float exp_of_negative(float x)
{
    float n = x * 1.44269504f;
    n = (n + 12582912.0f) - 12582912.0f; /* rounds to an integer: beside 1.5 * 2^23, a float has no fraction bits */
    float r = x - n * 0.693145752f;      /* ln 2 in two parts; n times the first is exact */
    r -= n * 1.42860677e-6f;
    float p = 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

/* Round a number from 0 to 1 to half precision, ties to even. Numbers below 2^-14 become subnormal. */
static inline uint16_t half_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t normal = (bits + 0xfff + ((bits >> 13) & 1) - (112u << 23)) >> 13;
    uint32_t subnormal = (uint32_t)(int32_t)((x * 16777216.0f + 12582912.0f) - 12582912.0f);
    return (uint16_t)(x < 6.103515625e-5f ? subnormal : normal);
}

static inline float float_of(uint16_t half)
{
    uint32_t bits = ((uint32_t)half << 13) + (112u << 23);
    float normal;
    memcpy(&normal, &bits, sizeof normal);
    return half < 0x400 ? (float)half * 5.9604644775390625e-8f : normal;
}

typedef struct {
    int64_t width;
    void (*products)(const float *, int64_t, int64_t, const float *, int64_t, float *, int64_t, int64_t, int64_t,
                     int64_t, int);
    void (*contexts)(const float *, int64_t, int64_t, const float *, int64_t, float *, int64_t, int);
    float (*exponentials)(float *, const float *, const uint8_t *, int64_t);
    void (*scale_row)(const float *, float, float *, int64_t);
    void (*scale_row_streaming)(const float *, float, float *, int64_t);
    float (*to_bytes)(const float *, uint8_t *, int64_t);
    void (*from_bytes)(const uint8_t *, float *, int64_t);
    float (*to_halves)(const float *, uint16_t *, int64_t);
    void (*from_halves)(const uint16_t *, float *, int64_t);
    void (*raise_to_row)(const float *, float, float *, int64_t);
} routines;

#if defined(__x86_64__)
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")))
#define LANES 16
#define VECTORS 4
#define STREAM(out, vector) _mm512_stream_ps(out, (__m512)(vector))
#include "_kernel_loops.h"

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define VECTORS 2
#define STREAM(out, vector) _mm256_stream_ps(out, (__m256)(vector))
#include "_kernel_loops.h"
#endif

#define NAME(x) x##_any
#define TARGET
#define LANES 4
#define VECTORS 2
#include "_kernel_loops.h"

/* The routines for the newest instruction set of this processor, at most `max_isa`: 0 for any, 1 for AVX2, 2 for
   AVX-512. */
static const routines *available(int64_t max_isa)
{
#if defined(__x86_64__)
    if (max_isa >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &kernels_avx512;
    if (max_isa >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &kernels_avx2;
#endif
    (void)max_isa;
    return &kernels_any;
}

static int64_t panels(int64_t columns, int64_t width)
{
    return (columns + width - 1) / width;
}

static int64_t min_of(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Request large pages if the system has them. Each page of new memory costs a page fault, and the map of a long input
   has tens of thousands of small pages. */
void mapreuse_advise(void *start, int64_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t page = 4096, first = ((uintptr_t)start + page - 1) / page * page, end = (uintptr_t)start + bytes;
    if (end > first)
        madvise((void *)first, (end - first) / page * page, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

/* Round a number of floats up to whole cache lines. */
static int64_t padded_to_lines(int64_t floats)
{
    return (floats + 15) / 16 * 16;
}

static float *at(const matrices *of, int64_t head, int64_t row)
{
    return of->data ? (float *)of->data + head * of->head + row * of->row : 0;
}

/* Pack the transpose of `count` vectors of `dim` numbers into one panel: column c is vector c. */
static void pack_transposed(const float *vectors, int64_t stride, int64_t count, int64_t dim, int64_t width, float *out)
{
    for (int64_t c = 0; c < width; c++)
        for (int64_t d = 0; d < dim; d++)
            out[d * width + c] = c < count ? vectors[c * stride + d] : 0.0f;
}

/* Pack columns `first` ... of `count` rows into one panel. */
static void pack(const float *rows, int64_t stride, int64_t count, int64_t first, int64_t columns, int64_t width,
                 float *out)
{
    int64_t used = min_of(columns - first, width);
    for (int64_t k = 0; k < count; k++, out += width) {
        memcpy(out, rows + k * stride + first, used * sizeof *out);
        memset(out + used, 0, (width - used) * sizeof *out);
    }
}

static void pack_values(const matrices *values, int64_t head, int64_t keys, int64_t value_dim, int64_t panel,
                        int64_t width, float *out)
{
    pack(at(values, head, 0), values->row, keys, panel * width, value_dim, width, out);
}

/* context += weights @ values, for `depth` keys from `start` on. If `start` is 0, the context is overwritten. */
static void multiply(const routines *on, const float *weights, int64_t stride, int64_t rows, const float *values,
                     int64_t keys, int64_t start, int64_t depth, int64_t value_dim, float *context)
{
    int64_t width = on->width, num_panels = panels(value_dim, width);
    for (int64_t panel = 0; panel < num_panels; panel++)
        on->contexts(weights, stride, rows, values + (panel * keys + start) * width, depth, context + panel * width,
                     num_panels * width, start == 0);
}

/* Scale of a row of weights with this sum. A row without allowed keys stays zero, NaN stays NaN. */
static float reciprocal(float sum)
{
    return sum == 0.0f ? 0.0f : 1.0f / sum;
}

/* Store a row of the map, from weights that are not divided by their sum yet. */
static void store_row(const routines *on, const compute_arguments *layer, int64_t head, int64_t row,
                      const float *weights, float sum, int64_t keys)
{
    const map *to = &layer->weights;
    int64_t place = head * to->head + row * to->row, rest = layer->width - keys;
    float total = sum;
    if (to->type == FLOAT) {
        float *out = (float *)to->data + place;
        on->scale_row_streaming(weights, reciprocal(sum), out, keys);
        memset(out + keys, 0, rest * sizeof *out);
        return;
    }
    if (to->type == HALF) {
        uint16_t *out = (uint16_t *)to->data + place;
        total = on->to_halves(weights, out, keys);
        memset(out + keys, 0, rest * sizeof *out);
    } else {
        uint8_t *out = (uint8_t *)to->data + place;
        total = on->to_bytes(weights, out, keys);
        memset(out + keys, 0, rest);
    }
    to->scales[head * to->scales_head + row * to->scales_row] = sum == sum ? reciprocal(total) : sum;
}

typedef struct {
    const float *keys, *distances, *values; /* packed matrices of one head */
} packed;

enum { POSITIONS, CONTENT, SOFTMAX, CONTEXT, PHASES };

static void end_phase(double *seconds, int phase, double *since)
{
    double now = omp_get_wtime();
    seconds[phase] += now - *since;
    *since = now;
}

/* Raise the maxima of the row's block of queries to its weights. */
static void raise_maxima(const routines *on, const compute_arguments *layer, int64_t row, const float *weights,
                         float scale, int64_t keys)
{
    int64_t before = min_of(row - layer->window + 1, keys), next = row + layer->window;
    float *maxima = at(&layer->maxima, omp_get_thread_num(), (row - layer->first_query) / layer->block);
    on->raise_to_row(weights, scale, maxima, before);
    on->raise_to_row(weights + next, scale, maxima + next, keys - next);
}

/* Compute `count` rows of one head, from `first` on. */
static void compute_rows(const routines *on, const compute_arguments *layer, const packed *operands, int64_t head,
                         int64_t first, int64_t count, float *query, float *scores, int64_t stride, float *context,
                         double *seconds)
{
    double since = omp_get_wtime();
    int64_t width = on->width, dim = layer->dim;
    int64_t keys = layer->is_causal ? min_of(layer->keys, first + count) : layer->keys;
    float *row_scores = scores + MARGIN;
    if (operands->distances) {
        for (int64_t i = 0; i < count; i++)
            on->scale_row(at(&layer->relative_query, head, first + i), layer->scaling, query + i * dim, dim);
        on->products(query, count, dim, operands->distances, panels(2 * layer->num_keys - 1, width), row_scores, stride,
                     first - (layer->num_keys - 1), 1, keys, 0);
        end_phase(seconds, POSITIONS, &since);
    }
    for (int64_t i = 0; i < count; i++)
        on->scale_row(at(&layer->query, head, first + i), layer->scaling, query + i * dim, dim);
    on->products(query, count, dim, operands->keys, panels(layer->keys, width), row_scores, stride, 0, 0, keys,
                 operands->distances != 0);
    end_phase(seconds, CONTENT, &since);

    float sums[count];
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i, row_keys = layer->is_causal ? min_of(keys, row + 1) : keys;
        const uint8_t *allowed = layer->allowed.data;
        float *weights = row_scores + i * stride;
        if (allowed)
            allowed += head * layer->allowed.head + row * layer->allowed.row;
        sums[i] = on->exponentials(weights, at(&layer->bias, head, row), allowed, row_keys);
        memset(weights + row_keys, 0, (keys - row_keys) * sizeof *weights);
        if (layer->weights.data)
            store_row(on, layer, head, row, weights, sums[i], keys);
        if (layer->maxima.data && row >= layer->first_query)
            raise_maxima(on, layer, row, weights, reciprocal(sums[i]), row_keys);
    }
    end_phase(seconds, SOFTMAX, &since);

    int64_t padded = panels(layer->value_dim, width) * width;
    for (int64_t start = 0; start < keys; start += DEPTH)
        multiply(on, row_scores + start, stride, count, operands->values, layer->keys, start,
                 min_of(DEPTH, keys - start), layer->value_dim, context);
    for (int64_t i = 0; i < count; i++)
        on->scale_row(context + i * padded, reciprocal(sums[i]),
                      at(&layer->context, head, first + i), layer->value_dim);
    end_phase(seconds, CONTEXT, &since);
}

/* Compute the context of one item and, if layer->weights has memory, its map. Returns the number of floats of working
   memory that it needs; if `memory` is null, it does nothing else. */
int64_t mapreuse_arguments_size(void)
{
    return 10000 * sizeof(compute_arguments) + sizeof(apply_arguments);
}

int64_t mapreuse_compute(const compute_arguments *layer, float *memory)
{
    const routines *on = available(layer->max_isa);
    int64_t width = on->width, dim = layer->dim, size = layer->rows_at_a_time;
    int64_t key_panels = panels(layer->keys, width), value_panels = panels(layer->value_dim, width);
    int64_t distance_panels = layer->relative_key.data ? panels(2 * layer->num_keys - 1, width) : 0;
    int64_t blocks = panels(layer->rows, size);
    /* Pack only as many heads at a time as keep all threads busy, so that they stay in the cache. */
    int64_t at_once = min_of(layer->heads, panels(8 * layer->threads, blocks ? blocks : 1));
    int64_t of_keys = key_panels * width * dim, of_distances = distance_panels * width * dim;
    int64_t of_values = value_panels * width * layer->keys, of_head = of_keys + of_distances + of_values;
    /* The stride of a row is not a multiple of a page: rows would compete for the same cache sets. */
    int64_t stride = (panels(layer->keys, MAX_WIDTH) * MAX_WIDTH + 2 * MARGIN + 1023) / 1024 * 1024 + 16;
    int64_t of_scores = padded_to_lines(size * stride), of_query = padded_to_lines(size * dim);
    int64_t of_thread = of_scores + of_query + padded_to_lines(size * value_panels * width);
    int64_t of_operands = padded_to_lines(at_once * of_head);
    if (!memory)
        return of_operands + layer->threads * of_thread;
    float *operands = memory;
#pragma omp parallel num_threads(layer->threads)
    {
        float *scores = memory + of_operands + omp_get_thread_num() * of_thread;
        float *query = scores + of_scores, *context = query + of_query;
        double seconds[PHASES] = {0};
        memset(scores, 0, size * stride * sizeof *scores);
        for (int64_t head = 0; head < layer->heads; head += at_once) {
            int64_t num_heads = min_of(at_once, layer->heads - head);
            int64_t to_pack = key_panels + distance_panels + value_panels;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < num_heads * to_pack; task++) {
                int64_t task_head = head + task / to_pack, panel = task % to_pack;
                float *out = operands + task / to_pack * of_head;
                if (panel < key_panels) {
                    int64_t first = panel * width;
                    pack_transposed(at(&layer->key, task_head, first), layer->key.row, layer->keys - first, dim, width,
                                    out + first * dim);
                } else if (panel < key_panels + distance_panels) {
                    int64_t first = (panel - key_panels) * width;
                    pack_transposed(at(&layer->relative_key, task_head, first), layer->relative_key.row,
                                    2 * layer->num_keys - 1 - first, dim, width, out + of_keys + first * dim);
                } else {
                    panel -= key_panels + distance_panels;
                    pack_values(&layer->values, task_head, layer->keys, layer->value_dim, panel, width,
                                out + of_keys + of_distances + panel * layer->keys * width);
                }
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < num_heads * blocks; task++) {
                const float *keys = operands + task / blocks * of_head;
                packed here = {keys, distance_panels ? keys + of_keys : 0, keys + of_keys + of_distances};
                int64_t first = task % blocks * size;
                compute_rows(on, layer, &here, head + task / blocks, first, min_of(size, layer->rows - first), query,
                             scores, stride, context, seconds);
            }
        }
#if defined(__x86_64__)
        _mm_sfence(); /* streaming stores become visible to other threads */
#endif
        for (int phase = 0; phase < PHASES && layer->seconds; phase++)
#pragma omp atomic
            layer->seconds[phase] += seconds[phase];
    }
    return of_operands + layer->threads * of_thread;
}

/* Apply the stored map of one item to another layer's values. Returns the number of floats of working memory that it
   needs; if `memory` is null, it does nothing else. */
int64_t mapreuse_apply(const apply_arguments *layer, float *memory)
{
    const routines *on = available(layer->max_isa);
    int64_t width = on->width, value_panels = panels(layer->value_dim, width), padded = value_panels * width;
    int64_t of_head = value_panels * layer->keys * width, blocks = panels(layer->rows, CHUNK_ROWS);
    int64_t of_values = padded_to_lines(layer->contexts * of_head);
    int64_t of_context = padded_to_lines(layer->contexts * CHUNK_ROWS * padded);
    int64_t of_thread = of_context + padded_to_lines(CHUNK_ROWS * DEPTH);
    if (!memory)
        return of_values + layer->threads * of_thread;
    float *values = memory;
    const map *from = &layer->weights;
#pragma omp parallel num_threads(layer->threads)
    {
        float *context = memory + of_values + omp_get_thread_num() * of_thread, *decompressed = context + of_context;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < layer->contexts * value_panels; task++) {
            int64_t slot = task / value_panels, panel = task % value_panels;
            pack_values(&layer->values, layer->values_of[slot], layer->keys, layer->value_dim, panel, width,
                        values + slot * of_head + panel * layer->keys * width);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < layer->map_heads * blocks; task++) {
            int64_t head = task / blocks, first = task % blocks * CHUNK_ROWS;
            int64_t count = min_of(CHUNK_ROWS, layer->rows - first);
            for (int64_t start = 0; start < layer->keys; start += DEPTH) {
                int64_t depth = min_of(DEPTH, layer->keys - start), stride = from->row;
                int64_t place = head * from->head + first * from->row + start;
                const float *weights = (const float *)from->data + place;
                if (from->type != FLOAT) {
                    for (int64_t i = 0; i < count; i++, place += from->row)
                        if (from->type == HALF)
                            on->from_halves((const uint16_t *)from->data + place, decompressed + i * DEPTH, depth);
                        else
                            on->from_bytes((const uint8_t *)from->data + place, decompressed + i * DEPTH, depth);
                    weights = decompressed;
                    stride = DEPTH;
                }
                for (int64_t slot = 0; slot < layer->contexts; slot++)
                    if (layer->map_of[slot] == head)
                        multiply(on, weights, stride, count, values + slot * of_head, layer->keys, start, depth,
                                 layer->value_dim, context + slot * CHUNK_ROWS * padded);
            }
            for (int64_t slot = 0; slot < layer->contexts; slot++)
                for (int64_t i = 0; i < count && layer->map_of[slot] == head; i++) {
                    float scale = 1.0f;
                    if (from->scales)
                        scale = from->scales[head * from->scales_head + (first + i) * from->scales_row];
                    on->scale_row(context + (slot * CHUNK_ROWS + i) * padded, scale,
                                  at(&layer->context, slot, first + i), layer->value_dim);
                }
        }
    }
    return of_values + layer->threads * of_thread;
}

/* out = softmax(scores + addend) over the keys. `addend` may be null; `scores` is overwritten and may equal `out`. */
void mapreuse_softmax_of_sum(float *scores, const int64_t *scores_strides, const float *addend,
                             const int64_t *addend_strides, float *out, const int64_t *out_strides, int64_t heads,
                             int64_t rows, int64_t keys, int64_t threads, int64_t max_isa)
{
    const routines *on = available(max_isa);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < heads * rows; item++) {
        int64_t head = item / rows, row = item % rows;
        float *weights = scores + head * scores_strides[0] + row * scores_strides[1];
        const float *added = addend ? addend + head * addend_strides[0] + row * addend_strides[1] : 0;
        float sum = on->exponentials(weights, added, 0, keys);
        on->scale_row(weights, 1.0f / sum, out + head * out_strides[0] + row * out_strides[1], keys);
    }
}
