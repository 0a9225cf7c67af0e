/* The exact attention core of one item, some rows at a time: scores, softmax and context stay in a core's own cache.

   Every number is a float, every last axis is adjacent, every stride is in elements. Where it is multiplied, a matrix
   is packed: into panels of as many columns as the sums of a tile have, one row of a panel after the other. */

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define MOST_WIDTH 64 /* columns of the widest panel */
#define ROWS 6        /* rows of a tile */
#define MARGIN 80     /* columns before and after a row of scores that slanted tiles may reach into */
#define DEPTH 128     /* keys whose values stay in the first-level cache while rows are multiplied by them */
#define CHUNK_ROWS 48 /* rows of a stored map that are applied at a time */

_Static_assert(MARGIN >= MOST_WIDTH + ROWS - 1, "a tile that ends in a row begins at most so far before it");

enum { FLOAT = 0, HALF = 1, BYTE = 2 };

typedef struct {
    void *data;
    int64_t head, row; /* strides */
} matrices;

typedef struct {
    void *data; /* null where there is none */
    int64_t head, row;
    int64_t type; /* FLOAT, or numbers from 0 to 1 as HALF or (in 255ths) as BYTE */
    float *scales; /* by which a row's numbers are multiplied; null for FLOAT */
    int64_t scales_head, scales_row;
} map;

/* The arguments of one computing layer's core; what is optional has null data. */
typedef struct {
    int64_t heads, rows, keys, dim, value_dim;
    float scaling;
    int64_t is_causal;
    matrices query, key, values;
    matrices relative_query, relative_key; /* keys at the distances from num_keys - 1 down to -(num_keys - 1) */
    int64_t num_keys;
    matrices bias, allowed; /* the second of bytes: what may not be attended is 0 */
    matrices context;
    map weights; /* receives the map, `width` columns of it, those beyond `keys` being zero */
    int64_t width;
    int64_t rows_at_a_time, threads, newest;
    double *seconds; /* null, or receives those of all threads by phase: positions, content, softmax, context */
} computing;

/* The arguments of one reusing layer's core. */
typedef struct {
    int64_t map_heads, rows, keys, value_dim;
    map weights;
    matrices values;
    int64_t contexts; /* heads of the context, */
    const int64_t *map_of, *values_of; /* and of each, which head of the map meets which head of the values */
    matrices context;
    int64_t threads, newest;
} applying;

/* e^x for x <= 0: 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor polynomial of degree 6 (relative error 2e-7),
   zero below the least normal number. NaN stays NaN. */
static inline float exp_of_negative(float x)
{
    float n = x * 1.44269504f;
    n = (n + 12582912.0f) - 12582912.0f; /* rounds to an integer: 1.5 * 2^23 leaves no bits for a fraction */
    float r = x - n * 0.693145752f;      /* ln 2 in two parts, so that n times the first is exact */
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

/* Numbers from 0 to 1 in half precision, rounded to the nearest, ties to even; below 2^-14 they have fewer bits. */
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
    void (*scaled)(const float *, float, float *, int64_t);
    void (*streamed)(const float *, float, float *, int64_t);
    float (*to_bytes)(const float *, uint8_t *, int64_t);
    void (*from_bytes)(const uint8_t *, float *, int64_t);
    float (*to_halves)(const float *, uint16_t *, int64_t);
    void (*from_halves)(const uint16_t *, float *, int64_t);
} instructions;

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

/* The newest instructions that this processor has, but none newer than `newest`: 0 for any, 1 for AVX2, 2 for AVX512. */
static const instructions *available(int64_t newest)
{
#if defined(__x86_64__)
    if (newest >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &kernels_avx512;
    if (newest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &kernels_avx2;
#endif
    (void)newest;
    return &kernels_any;
}

static int64_t panels(int64_t columns, int64_t width)
{
    return (columns + width - 1) / width;
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Asks for pages of megabytes, where the system has them: fresh memory costs a fault for every page, and there are
   tens of thousands of the small ones in a long input's map. */
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

/* Floats of a piece of working memory, a whole number of cache lines. */
static int64_t piece(int64_t floats)
{
    return (floats + 15) / 16 * 16;
}

static float *at(const matrices *of, int64_t head, int64_t row)
{
    return of->data ? (float *)of->data + head * of->head + row * of->row : 0;
}

/* One panel of the transpose of `count` vectors of `dim` numbers: column c is vector c. */
static void pack_transposed(const float *vectors, int64_t stride, int64_t count, int64_t dim, int64_t width, float *out)
{
    for (int64_t c = 0; c < width; c++)
        for (int64_t d = 0; d < dim; d++)
            out[d * width + c] = c < count ? vectors[c * stride + d] : 0.0f;
}

/* One panel of `count` rows: columns from `first` on. */
static void pack(const float *rows, int64_t stride, int64_t count, int64_t first, int64_t columns, int64_t width,
                 float *out)
{
    int64_t some = least(columns - first, width);
    for (int64_t k = 0; k < count; k++, out += width) {
        memcpy(out, rows + k * stride + first, some * sizeof *out);
        memset(out + some, 0, (width - some) * sizeof *out);
    }
}

static void pack_values(const matrices *values, int64_t head, int64_t keys, int64_t value_dim, int64_t panel,
                        int64_t width, float *out)
{
    pack(at(values, head, 0), values->row, keys, panel * width, value_dim, width, out);
}

/* Multiplies `depth` weights of some rows, from key `start` on, with as many packed values, and adds that to their
   context; the first of them begin it. */
static void multiply(const instructions *on, const float *weights, int64_t stride, int64_t rows, const float *values,
                     int64_t keys, int64_t start, int64_t depth, int64_t value_dim, float *context)
{
    int64_t width = on->width, num_panels = panels(value_dim, width);
    for (int64_t panel = 0; panel < num_panels; panel++)
        on->contexts(weights, stride, rows, values + (panel * keys + start) * width, depth, context + panel * width,
                     num_panels * width, start == 0);
}

/* What weights are divided by their sum with; a row that attends nothing stays zero, NaN stays NaN. */
static float reciprocal(float sum)
{
    return sum == 0.0f ? 0.0f : 1.0f / sum;
}

/* Stores a row of a map: e^(score - greatest) / sum. */
static void keep(const instructions *on, const computing *layer, int64_t head, int64_t row, const float *weights,
                 float sum, int64_t keys)
{
    const map *to = &layer->weights;
    int64_t place = head * to->head + row * to->row, rest = layer->width - keys;
    float total = sum;
    if (to->type == FLOAT) {
        float *out = (float *)to->data + place;
        on->streamed(weights, reciprocal(sum), out, keys);
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
    const float *keys, *distances, *values; /* packed, of one head */
} packed;

enum { POSITIONS, CONTENT, SOFTMAX, CONTEXT, PHASES };

static void phase_ended(double *seconds, int phase, double *since)
{
    double now = omp_get_wtime();
    seconds[phase] += now - *since;
    *since = now;
}

/* Rows first ... first + count - 1 of one head. */
static void compute_rows(const instructions *on, const computing *layer, const packed *operands, int64_t head,
                         int64_t first, int64_t count, float *query, float *scores, int64_t stride, float *context,
                         double *seconds)
{
    double since = omp_get_wtime();
    int64_t width = on->width, dim = layer->dim;
    int64_t keys = layer->is_causal ? least(layer->keys, first + count) : layer->keys;
    float *row_scores = scores + MARGIN;
    if (operands->distances) {
        for (int64_t i = 0; i < count; i++)
            on->scaled(at(&layer->relative_query, head, first + i), layer->scaling, query + i * dim, dim);
        on->products(query, count, dim, operands->distances, panels(2 * layer->num_keys - 1, width), row_scores, stride,
                     first - (layer->num_keys - 1), 1, keys, 0);
        phase_ended(seconds, POSITIONS, &since);
    }
    for (int64_t i = 0; i < count; i++)
        on->scaled(at(&layer->query, head, first + i), layer->scaling, query + i * dim, dim);
    on->products(query, count, dim, operands->keys, panels(layer->keys, width), row_scores, stride, 0, 0, keys,
                 operands->distances != 0);
    phase_ended(seconds, CONTENT, &since);

    float sums[count];
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i, own = layer->is_causal ? least(keys, row + 1) : keys;
        const uint8_t *allowed = layer->allowed.data;
        float *weights = row_scores + i * stride;
        if (allowed)
            allowed += head * layer->allowed.head + row * layer->allowed.row;
        sums[i] = on->exponentials(weights, at(&layer->bias, head, row), allowed, own);
        memset(weights + own, 0, (keys - own) * sizeof *weights);
        if (layer->weights.data)
            keep(on, layer, head, row, weights, sums[i], keys);
    }
    phase_ended(seconds, SOFTMAX, &since);

    int64_t padded = panels(layer->value_dim, width) * width;
    for (int64_t start = 0; start < keys; start += DEPTH)
        multiply(on, row_scores + start, stride, count, operands->values, layer->keys, start,
                 least(DEPTH, keys - start), layer->value_dim, context);
    for (int64_t i = 0; i < count; i++)
        on->scaled(context + i * padded, reciprocal(sums[i]),
                   at(&layer->context, head, first + i), layer->value_dim);
    phase_ended(seconds, CONTEXT, &since);
}

/* Context, and map where it is asked for, of all heads and rows of one item. Returns the floats of working memory that
   it takes; with null, it does nothing else. */
int64_t mapreuse_compute(const computing *layer, float *memory)
{
    const instructions *on = available(layer->newest);
    int64_t width = on->width, dim = layer->dim, size = layer->rows_at_a_time;
    int64_t key_panels = panels(layer->keys, width), value_panels = panels(layer->value_dim, width);
    int64_t distance_panels = layer->relative_key.data ? panels(2 * layer->num_keys - 1, width) : 0;
    int64_t blocks = panels(layer->rows, size);
    /* Few heads are packed at a time: enough to keep every thread busy, no more than need be in the cache. */
    int64_t at_once = least(layer->heads, panels(8 * layer->threads, blocks ? blocks : 1));
    int64_t of_keys = key_panels * width * dim, of_distances = distance_panels * width * dim;
    int64_t of_values = value_panels * width * layer->keys, of_head = of_keys + of_distances + of_values;
    /* A row's stride is no multiple of a page, so that rows do not compete for the same places of a cache. */
    int64_t stride = (panels(layer->keys, MOST_WIDTH) * MOST_WIDTH + 2 * MARGIN + 1023) / 1024 * 1024 + 16;
    int64_t of_scores = piece(size * stride), of_query = piece(size * dim);
    int64_t of_thread = of_scores + of_query + piece(size * value_panels * width), of_operands = piece(at_once * of_head);
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
            int64_t some = least(at_once, layer->heads - head);
            int64_t to_pack = key_panels + distance_panels + value_panels;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < some * to_pack; task++) {
                int64_t own = head + task / to_pack, panel = task % to_pack;
                float *out = operands + task / to_pack * of_head;
                if (panel < key_panels) {
                    int64_t first = panel * width;
                    pack_transposed(at(&layer->key, own, first), layer->key.row, layer->keys - first, dim, width,
                                    out + first * dim);
                } else if (panel < key_panels + distance_panels) {
                    int64_t first = (panel - key_panels) * width;
                    pack_transposed(at(&layer->relative_key, own, first), layer->relative_key.row,
                                    2 * layer->num_keys - 1 - first, dim, width, out + of_keys + first * dim);
                } else {
                    panel -= key_panels + distance_panels;
                    pack_values(&layer->values, own, layer->keys, layer->value_dim, panel, width,
                                out + of_keys + of_distances + panel * layer->keys * width);
                }
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < some * blocks; task++) {
                const float *own = operands + task / blocks * of_head;
                packed here = {own, distance_panels ? own + of_keys : 0, own + of_keys + of_distances};
                int64_t first = task % blocks * size;
                compute_rows(on, layer, &here, head + task / blocks, first, least(size, layer->rows - first), query,
                             scores, stride, context, seconds);
            }
        }
#if defined(__x86_64__)
        _mm_sfence(); /* what went past the caches is there for whoever reads it next */
#endif
        for (int phase = 0; phase < PHASES && layer->seconds; phase++)
#pragma omp atomic
            layer->seconds[phase] += seconds[phase];
    }
    return of_operands + layer->threads * of_thread;
}

/* Context of stored weights and another layer's values, of one item. Returns the floats of working memory that
   it takes; with null, it does nothing else. */
int64_t mapreuse_apply(const applying *layer, float *memory)
{
    const instructions *on = available(layer->newest);
    int64_t width = on->width, value_panels = panels(layer->value_dim, width), padded = value_panels * width;
    int64_t of_head = value_panels * layer->keys * width, blocks = panels(layer->rows, CHUNK_ROWS);
    int64_t of_values = piece(layer->contexts * of_head), of_context = piece(layer->contexts * CHUNK_ROWS * padded);
    int64_t of_thread = of_context + piece(CHUNK_ROWS * DEPTH);
    if (!memory)
        return of_values + layer->threads * of_thread;
    float *values = memory;
    const map *from = &layer->weights;
#pragma omp parallel num_threads(layer->threads)
    {
        float *context = memory + of_values + omp_get_thread_num() * of_thread, *decompressed = context + of_context;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < layer->contexts * value_panels; task++) {
            int64_t own = task / value_panels, panel = task % value_panels;
            pack_values(&layer->values, layer->values_of[own], layer->keys, layer->value_dim, panel, width,
                        values + own * of_head + panel * layer->keys * width);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < layer->map_heads * blocks; task++) {
            int64_t head = task / blocks, first = task % blocks * CHUNK_ROWS;
            int64_t count = least(CHUNK_ROWS, layer->rows - first);
            for (int64_t start = 0; start < layer->keys; start += DEPTH) {
                int64_t depth = least(DEPTH, layer->keys - start), stride = from->row;
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
                for (int64_t own = 0; own < layer->contexts; own++)
                    if (layer->map_of[own] == head)
                        multiply(on, weights, stride, count, values + own * of_head, layer->keys, start, depth,
                                 layer->value_dim, context + own * CHUNK_ROWS * padded);
            }
            for (int64_t own = 0; own < layer->contexts; own++)
                for (int64_t i = 0; i < count && layer->map_of[own] == head; i++) {
                    float scale = 1.0f;
                    if (from->scales)
                        scale = from->scales[head * from->scales_head + (first + i) * from->scales_row];
                    on->scaled(context + (own * CHUNK_ROWS + i) * padded, scale,
                               at(&layer->context, own, first + i), layer->value_dim);
                }
        }
    }
    return of_values + layer->threads * of_thread;
}

/* out = softmax(scores + addend) over keys; `addend` may be null, `scores` is overwritten and may be `out`. */
void mapreuse_softmax_of_sum(float *scores, const int64_t *scores_strides, const float *addend,
                             const int64_t *addend_strides, float *out, const int64_t *out_strides, int64_t heads,
                             int64_t rows, int64_t keys, int64_t threads, int64_t newest)
{
    const instructions *on = available(newest);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < heads * rows; item++) {
        int64_t head = item / rows, row = item % rows;
        float *own = scores + head * scores_strides[0] + row * scores_strides[1];
        float sum = on->exponentials(own, addend ? addend + head * addend_strides[0] + row * addend_strides[1] : 0, 0,
                                     keys);
        on->scaled(own, 1.0f / sum, out + head * out_strides[0] + row * out_strides[1], keys);
    }
}
