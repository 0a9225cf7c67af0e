/* Arguments of the functions in _kernel.c. All numbers are floats, the last axis of every matrix is contiguous, and
   strides count elements. */

#ifndef MAPREUSE_KERNEL_H
#define MAPREUSE_KERNEL_H

#include <stdint.h>

#define CHUNK_ROWS 48 /* rows of a stored map that are applied at a time */

enum { FLOAT = 0, HALF = 1, BYTE = 2 };

typedef struct {
    void *data; /* null if absent */
    int64_t head, row; /* strides */
} matrices;

typedef struct {
    void *data; /* null if absent */
    int64_t head, row;
    int64_t type; /* FLOAT for weights; HALF or BYTE for compressed weights from 0 to 1 or from 0 to 255 */
    float *scales; /* scale of each row of compressed weights; null for FLOAT */
    int64_t scales_head, scales_row;
} map;

/* Arguments of mapreuse_compute. */
typedef struct {
    int64_t heads, rows, keys, dim, value_dim;
    float scaling;
    int64_t is_causal;
    matrices query, key, values;
    matrices relative_query, relative_key; /* one key per distance, from num_keys - 1 down to -(num_keys - 1) */
    int64_t num_keys;
    matrices bias, allowed; /* allowed: one byte per key, 0 if masked */
    matrices context;
    map weights; /* receives `width` columns of the map; those beyond `keys` are zero */
    int64_t width;
    int64_t rows_at_a_time, threads, max_isa;
    double *seconds; /* null, or receives the time by phase, summed over threads */
    matrices maxima; /* null, or for each thread (`head`) and block of queries (`row`), the largest weight of each key
                        that is at least `window` positions away from its query; zero at the start */
    int64_t window, block, first_query; /* blocks are counted from the first query */
} compute_arguments;

/* Arguments of mapreuse_apply. */
typedef struct {
    int64_t map_heads, rows, keys, value_dim;
    map weights;
    matrices values;
    int64_t contexts; /* number of heads of the context */
    const int64_t *map_of, *values_of; /* for each of them, its head of the map and its head of the values */
    matrices context;
    int64_t threads, max_isa;
} apply_arguments;

int64_t mapreuse_arguments_size(void); /* sizes of the two structs above: another one means another version */
int64_t mapreuse_compute(const compute_arguments *layer, float *memory);
int64_t mapreuse_apply(const apply_arguments *layer, float *memory);

#endif
