/* Attention with 8-bit products, for exported int8 models, on processors with AVX-512 VNNI.

   Queries, keys and encodings of distances have one scale per vector, values one per column. The weights of a row are
   rounded to multiples of 1/255 of the largest one; what rounding takes from a weight is added to the weight of the
   sixteenth key after it, so that many small weights keep their sum. Softmax and scales are computed in float. */

#include "../maps/_kernel.c"
#include "_int8.h"

#define GROUP 4         /* products that one instruction adds up */
#define CHUNK_BYTES 512 /* keys whose values fit into the first-level cache */

#if defined(__x86_64__)

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,prefer-vector-width=512")))

/* Columns in panels of 64: groups of 4 numbers of each column, with scales, and -128 times the sums of the columns. */
typedef struct {
    int8_t *numbers;
    float *scales;
    int32_t *offsets;
} columns8;

static int64_t groups_of(int64_t numbers)
{
    return (numbers + GROUP - 1) / GROUP;
}

/* Round a vector to integers from -127 to 127, with zeros up to a whole group; returns its scale. */
VNNI static float to_int8(const float *vector, int64_t dim, int8_t *out)
{
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t d = 0; d < dim; d++) {
        float size = fabsf(vector[d]);
        largest = size > largest ? size : largest;
    }
    float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
#pragma omp simd
    for (int64_t d = 0; d < dim; d++)
        out[d] = (int8_t)(int32_t)rintf(vector[d] * inverse);
    for (int64_t d = dim; d < groups_of(dim) * GROUP; d++)
        out[d] = 0;
    return largest / 127.0f;
}

/* Pack `count` vectors as the columns of one panel. */
VNNI static void pack_columns8(const float *vectors, int64_t stride, int64_t count, int64_t dim, columns8 *out,
                               int64_t panel)
{
    int64_t groups = groups_of(dim);
    int8_t numbers[groups * GROUP];
    int32_t *words = (int32_t *)(out->numbers + panel * groups * GROUP * MAX_WIDTH);
    for (int64_t c = 0; c < MAX_WIDTH; c++) {
        float scale = 0.0f;
        int32_t sum = 0;
        if (c < count)
            scale = to_int8(vectors + c * stride, dim, numbers);
        else
            memset(numbers, 0, sizeof numbers);
        for (int64_t d = 0; d < groups * GROUP; d++)
            sum += numbers[d];
        for (int64_t g = 0; g < groups; g++)
            memcpy(words + g * MAX_WIDTH + c, numbers + g * GROUP, GROUP);
        out->scales[panel * MAX_WIDTH + c] = scale;
        out->offsets[panel * MAX_WIDTH + c] = -128 * sum;
    }
}

/* Pack the values of one head: columns are dimensions, and groups are four keys. */
VNNI static void pack_values8(const matrices *values, int64_t head, int64_t keys, int64_t value_dim, columns8 *out,
                              int64_t panel)
{
    int64_t first = panel * MAX_WIDTH, used = min_of(value_dim - first, MAX_WIDTH), groups = groups_of(keys);
    int8_t *numbers = out->numbers + panel * groups * GROUP * MAX_WIDTH;
    float largest[MAX_WIDTH] = {0}, inverse[MAX_WIDTH];
    for (int64_t k = 0; k < keys; k++) {
        const float *row = at(values, head, k) + first;
#pragma omp simd
        for (int64_t c = 0; c < used; c++) {
            float size = fabsf(row[c]);
            largest[c] = size > largest[c] ? size : largest[c];
        }
    }
    for (int64_t c = 0; c < MAX_WIDTH; c++) {
        inverse[c] = largest[c] > 0.0f ? 127.0f / largest[c] : 0.0f;
        out->scales[first + c] = largest[c] / 127.0f;
    }
    for (int64_t g = 0; g < groups; g++) {
        int32_t words[MAX_WIDTH] = {0};
        for (int64_t k = g * GROUP; k < min_of((g + 1) * GROUP, keys); k++) {
            const float *row = at(values, head, k) + first;
            int shift = 8 * (int)(k % GROUP);
#pragma omp simd
            for (int64_t c = 0; c < used; c++)
                words[c] |= ((int32_t)rintf(row[c] * inverse[c]) & 255) << shift;
        }
        memcpy(numbers + g * sizeof words, words, sizeof words);
    }
}

/* sums[r][:] += rows[r] . columns, for one panel. */
VNNI static inline __attribute__((always_inline)) void tile8(const uint8_t *const rows[ROWS], const int8_t *columns,
                                                             int64_t groups, __m512i sums[ROWS][4])
{
    for (int64_t g = 0; g < groups; g++, columns += GROUP * MAX_WIDTH) {
        __m512i column[4];
        for (int v = 0; v < 4; v++)
            column[v] = _mm512_loadu_si512(columns + 64 * v);
        for (int r = 0; r < ROWS; r++) {
            int32_t word;
            memcpy(&word, rows[r] + g * GROUP, sizeof word);
            __m512i row = _mm512_set1_epi32(word);
            for (int v = 0; v < 4; v++)
                sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], row, column[v]);
        }
    }
}

/* `products` of _kernel_loops.h for 8-bit rows, which are stored with 128 added. */
VNNI static void products8(const uint8_t *query, const float *row_scales, int64_t num_rows, int64_t groups,
                           const columns8 *packed, int64_t num_panels, float *scores, int64_t stride, int64_t place,
                           int64_t slant, int64_t keys, int add)
{
    for (int64_t panel = 0; panel < num_panels; panel++) {
        const int8_t *columns = packed->numbers + panel * groups * GROUP * MAX_WIDTH;
        const float *scales = packed->scales + panel * MAX_WIDTH;
        const int32_t *offsets = packed->offsets + panel * MAX_WIDTH;
        for (int64_t first = 0; first < num_rows; first += ROWS) {
            int64_t count = min_of(num_rows - first, ROWS);
            int64_t start = place + panel * MAX_WIDTH + first * slant;
            if (start >= keys || start + (count - 1) * slant + MAX_WIDTH <= 0)
                continue;
            const uint8_t *rows[ROWS];
            __m512i sums[ROWS][4];
            for (int64_t r = 0; r < ROWS; r++) {
                rows[r] = query + (first + (r < count ? r : count - 1)) * groups * GROUP;
                for (int v = 0; v < 4; v++)
                    sums[r][v] = _mm512_loadu_si512(offsets + 16 * v);
            }
            tile8(rows, columns, groups, sums);
            for (int r = 0; r < ROWS; r++) {
                if (r >= count)
                    break;
                float *out = scores + (first + r) * stride + start + r * slant;
                __m512 row_scale = _mm512_set1_ps(row_scales[first + r]);
                for (int v = 0; v < 4; v++) {
                    __m512 scale = _mm512_mul_ps(row_scale, _mm512_loadu_ps(scales + 16 * v));
                    __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][v]), scale);
                    if (add)
                        score = _mm512_add_ps(score, _mm512_loadu_ps(out + 16 * v));
                    _mm512_storeu_ps(out + 16 * v, score);
                }
            }
        }
    }
}

/* context[i][c] = scale of row i * scale of column c * sum over keys of weights[i][k] * values[k][c]. `sums` is working
   memory of CHUNK_ROWS * MAX_WIDTH numbers. */
VNNI static void contexts8(const uint8_t *weights, int64_t stride, const float *row_scales, int64_t num_rows,
                           int64_t keys, const columns8 *values, int64_t panel, int32_t *sums, const matrices *context,
                           int64_t head, int64_t first_row, int64_t value_dim)
{
    int64_t groups = groups_of(keys);
    const int8_t *columns = values->numbers + panel * groups * GROUP * MAX_WIDTH;
    for (int64_t start = 0; start < groups; start += CHUNK_BYTES / GROUP) {
        int64_t depth = min_of(groups - start, CHUNK_BYTES / GROUP);
        for (int64_t first = 0; first < num_rows; first += ROWS) {
            int64_t count = min_of(num_rows - first, ROWS);
            const uint8_t *rows[ROWS];
            __m512i tile[ROWS][4];
            for (int64_t r = 0; r < ROWS; r++) {
                rows[r] = weights + (first + (r < count ? r : count - 1)) * stride + start * GROUP;
                for (int v = 0; v < 4; v++)
                    tile[r][v] = start && r < count
                                     ? _mm512_loadu_si512(sums + (first + r) * MAX_WIDTH + 16 * v)
                                     : _mm512_setzero_si512();
            }
            tile8(rows, columns + start * GROUP * MAX_WIDTH, depth, tile);
            for (int r = 0; r < ROWS; r++) {
                if (r >= count)
                    break;
                for (int v = 0; v < 4; v++)
                    _mm512_storeu_si512(sums + (first + r) * MAX_WIDTH + 16 * v, tile[r][v]);
            }
        }
    }
    int64_t from = panel * MAX_WIDTH, used = min_of(value_dim - from, MAX_WIDTH);
    for (int64_t i = 0; i < num_rows; i++) {
        float *out = at(context, head, first_row + i) + from;
#pragma omp simd
        for (int64_t c = 0; c < used; c++)
            out[c] = (float)sums[i * MAX_WIDTH + c] * (row_scales[i] * values->scales[from + c]);
    }
}

/* Round weights from 0 to 1 to multiples of 1/255, with zeros up to `width`; returns the sum. Rounding errors are
   passed on to the sixteenth number after. */
VNNI static float to_bytes_passing_errors(const float *row, int64_t keys, int64_t width, uint8_t *out)
{
    __m512 error = _mm512_setzero_ps(), zero = _mm512_setzero_ps(), most = _mm512_set1_ps(255.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t j = 0; j < width; j += 16) {
        __mmask16 used = keys - j >= 16 ? 0xffff : keys > j ? (__mmask16)((1 << (keys - j)) - 1) : 0;
        __m512 exact = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(used, row + j), most, error);
        __m512i number = _mm512_maskz_cvtps_epi32(used, _mm512_max_ps(_mm512_min_ps(exact, most), zero));
        error = _mm512_sub_ps(exact, _mm512_cvtepi32_ps(number));
        sum = _mm512_add_epi32(sum, number);
        _mm_storeu_si128((__m128i *)(out + j), _mm512_cvtepi32_epi8(number));
    }
    return (float)_mm512_reduce_add_epi32(sum);
}

static columns8 columns_in(char *memory, int64_t numbers, int64_t columns)
{
    int64_t bytes = (numbers + 63) / 64 * 64;
    return (columns8){(int8_t *)memory, (float *)(memory + bytes), (int32_t *)(memory + bytes) + columns};
}

static int64_t bytes_of_columns(int64_t numbers, int64_t columns)
{
    return (numbers + 63) / 64 * 64 + 8 * columns;
}

/* Quantise rows of queries; the scale of a row includes the factor of the scores. */
VNNI static void pack_rows8(const matrices *from, int64_t head, int64_t first, int64_t count, int64_t dim,
                            float scaling, uint8_t *out, float *scales)
{
    int64_t padded = groups_of(dim) * GROUP;
    for (int64_t i = 0; i < count; i++, out += padded) {
        scales[i] = scaling * to_int8(at(from, head, first + i), dim, (int8_t *)out);
        for (int64_t d = 0; d < padded; d++)
            out[d] ^= 128;
    }
}

typedef struct {
    columns8 keys, distances, values;
} packed8;

static void compute_rows8(const routines *on, const compute_arguments *layer, const packed8 *operands, int64_t head,
                          int64_t first, int64_t count, float *scores, int64_t stride, uint8_t *query, uint8_t *bytes,
                          int64_t width, int32_t *sums)
{
    int64_t groups = groups_of(layer->dim);
    int64_t keys = layer->is_causal ? min_of(layer->keys, first + count) : layer->keys;
    float *row_scores = scores + MARGIN, scales[CHUNK_ROWS];
    int relative = layer->relative_key.data != 0;
    if (relative) {
        pack_rows8(&layer->relative_query, head, first, count, layer->dim, layer->scaling, query, scales);
        products8(query, scales, count, groups, &operands->distances, panels(2 * layer->num_keys - 1, MAX_WIDTH),
                  row_scores, stride, first - (layer->num_keys - 1), 1, keys, 0);
    }
    pack_rows8(&layer->query, head, first, count, layer->dim, layer->scaling, query, scales);
    products8(query, scales, count, groups, &operands->keys, panels(layer->keys, MAX_WIDTH), row_scores, stride, 0, 0,
              keys, relative);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i, row_keys = layer->is_causal ? min_of(keys, row + 1) : keys;
        const uint8_t *allowed = layer->allowed.data;
        float *weights = row_scores + i * stride;
        if (allowed)
            allowed += head * layer->allowed.head + row * layer->allowed.row;
        float sum = on->exponentials(weights, at(&layer->bias, head, row), allowed, row_keys);
        uint8_t *out = bytes + i * width;
        float total = to_bytes_passing_errors(weights, row_keys, width, out);
        scales[i] = sum == sum ? reciprocal(total) : sum; /* NaN stays NaN */
        if (layer->weights.data) {
            const map *to = &layer->weights;
            memcpy((uint8_t *)to->data + head * to->head + row * to->row, out, layer->width);
            to->scales[head * to->scales_head + row * to->scales_row] = scales[i];
        }
    }
    for (int64_t panel = 0; panel < panels(layer->value_dim, MAX_WIDTH); panel++)
        contexts8(bytes, width, scales, count, layer->keys, &operands->values, panel, sums, &layer->context, head,
                  first, layer->value_dim);
}

/* mapreuse_compute with 8-bit products. The map, if it is wanted, has type BYTE and a width that is a multiple of 64,
   and rows_at_a_time is at most CHUNK_ROWS. Needs has_int8_products(). Returns the size of its working memory in
   floats; if `memory` is null, it does nothing else. */
int64_t mapreuse_compute_int8(const compute_arguments *layer, float *memory)
{
    const routines *on = available(2);
    int64_t dim = layer->dim, size = layer->rows_at_a_time, groups = groups_of(dim), width = panels(layer->keys, 64) * 64;
    int64_t key_panels = panels(layer->keys, MAX_WIDTH), value_panels = panels(layer->value_dim, MAX_WIDTH);
    int64_t distance_panels = layer->relative_key.data ? panels(2 * layer->num_keys - 1, MAX_WIDTH) : 0;
    int64_t blocks = panels(layer->rows, size);
    int64_t at_once = min_of(layer->heads, panels(8 * layer->threads, blocks ? blocks : 1));
    int64_t panel_bytes = groups * GROUP * MAX_WIDTH;
    int64_t of_keys = bytes_of_columns(key_panels * panel_bytes, key_panels * MAX_WIDTH);
    int64_t of_distances = bytes_of_columns(distance_panels * panel_bytes, distance_panels * MAX_WIDTH);
    int64_t value_bytes = value_panels * groups_of(layer->keys) * GROUP * MAX_WIDTH;
    int64_t of_head = of_keys + of_distances + bytes_of_columns(value_bytes, value_panels * MAX_WIDTH);
    int64_t stride = (panels(layer->keys, MAX_WIDTH) * MAX_WIDTH + 2 * MARGIN + 1023) / 1024 * 1024 + 16;
    int64_t of_scores = padded_to_lines(size * stride) * sizeof(float), of_query = (size * groups * GROUP + 63) / 64 * 64;
    int64_t of_thread = of_scores + of_query + size * width + CHUNK_ROWS * MAX_WIDTH * sizeof(int32_t);
    int64_t bytes = at_once * of_head + layer->threads * of_thread;
    if (!memory)
        return panels(bytes, sizeof *memory);
    char *operands = (char *)memory;
#pragma omp parallel num_threads(layer->threads)
    {
        char *own = operands + at_once * of_head + omp_get_thread_num() * of_thread;
        float *scores = (float *)own;
        uint8_t *query = (uint8_t *)own + of_scores, *weights = query + of_query;
        int32_t *sums = (int32_t *)(weights + size * width);
        memset(scores, 0, of_scores);
        for (int64_t head = 0; head < layer->heads; head += at_once) {
            int64_t num_heads = min_of(at_once, layer->heads - head);
            int64_t to_pack = key_panels + distance_panels + value_panels;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < num_heads * to_pack; task++) {
                int64_t task_head = head + task / to_pack, panel = task % to_pack;
                char *place = operands + task / to_pack * of_head;
                columns8 keys = columns_in(place, key_panels * panel_bytes, key_panels * MAX_WIDTH);
                columns8 distances =
                    columns_in(place + of_keys, distance_panels * panel_bytes, distance_panels * MAX_WIDTH);
                columns8 values = columns_in(place + of_keys + of_distances, value_bytes, value_panels * MAX_WIDTH);
                if (panel < key_panels) {
                    int64_t first = panel * MAX_WIDTH;
                    pack_columns8(at(&layer->key, task_head, first), layer->key.row, layer->keys - first, dim, &keys,
                                  panel);
                } else if (panel < key_panels + distance_panels) {
                    int64_t first = (panel - key_panels) * MAX_WIDTH;
                    pack_columns8(at(&layer->relative_key, task_head, first), layer->relative_key.row,
                                  2 * layer->num_keys - 1 - first, dim, &distances, panel - key_panels);
                } else
                    pack_values8(&layer->values, task_head, layer->keys, layer->value_dim, &values,
                                 panel - key_panels - distance_panels);
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < num_heads * blocks; task++) {
                char *place = operands + task / blocks * of_head;
                packed8 here = {columns_in(place, key_panels * panel_bytes, key_panels * MAX_WIDTH),
                                columns_in(place + of_keys, distance_panels * panel_bytes, distance_panels * MAX_WIDTH),
                                columns_in(place + of_keys + of_distances, value_bytes, value_panels * MAX_WIDTH)};
                int64_t first = task % blocks * size;
                compute_rows8(on, layer, &here, head + task / blocks, first, min_of(size, layer->rows - first), scores,
                              stride, query, weights, width, sums);
            }
        }
    }
    return panels(bytes, sizeof *memory);
}

/* mapreuse_apply with 8-bit products, for a map of mapreuse_compute_int8. */
int64_t mapreuse_apply_int8(const apply_arguments *layer, float *memory)
{
    int64_t value_panels = panels(layer->value_dim, MAX_WIDTH), blocks = panels(layer->rows, CHUNK_ROWS);
    int64_t value_bytes = value_panels * groups_of(layer->keys) * GROUP * MAX_WIDTH;
    int64_t of_head = bytes_of_columns(value_bytes, value_panels * MAX_WIDTH);
    int64_t of_thread = CHUNK_ROWS * MAX_WIDTH * sizeof(int32_t);
    int64_t bytes = layer->contexts * of_head + layer->threads * of_thread;
    if (!memory)
        return panels(bytes, sizeof *memory);
    char *operands = (char *)memory;
    const map *from = &layer->weights;
#pragma omp parallel num_threads(layer->threads)
    {
        int32_t *sums = (int32_t *)(operands + layer->contexts * of_head + omp_get_thread_num() * of_thread);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < layer->contexts * value_panels; task++) {
            int64_t slot = task / value_panels;
            columns8 values = columns_in(operands + slot * of_head, value_bytes, value_panels * MAX_WIDTH);
            pack_values8(&layer->values, layer->values_of[slot], layer->keys, layer->value_dim, &values,
                         task % value_panels);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < layer->contexts * blocks; task++) {
            int64_t slot = task / blocks, first = task % blocks * CHUNK_ROWS, head = layer->map_of[slot];
            int64_t count = min_of(CHUNK_ROWS, layer->rows - first);
            const uint8_t *weights = (const uint8_t *)from->data + head * from->head + first * from->row;
            columns8 values = columns_in(operands + slot * of_head, value_bytes, value_panels * MAX_WIDTH);
            float scales[CHUNK_ROWS];
            for (int64_t i = 0; i < count; i++)
                scales[i] = from->scales[head * from->scales_head + (first + i) * from->scales_row];
            for (int64_t panel = 0; panel < value_panels; panel++)
                contexts8(weights, from->row, scales, count, layer->keys, &values, panel, sums, &layer->context, slot,
                          first, layer->value_dim);
        }
    }
    return panels(bytes, sizeof *memory);
}

int mapreuse_has_int8_products(void)
{
    return available(2) == &kernels_avx512 && __builtin_cpu_supports("avx512vnni");
}

#else

int64_t mapreuse_compute_int8(const compute_arguments *layer, float *memory)
{
    return mapreuse_compute(layer, memory);
}

int64_t mapreuse_apply_int8(const apply_arguments *layer, float *memory)
{
    return mapreuse_apply(layer, memory);
}

int mapreuse_has_int8_products(void)
{
    return 0;
}

#endif
