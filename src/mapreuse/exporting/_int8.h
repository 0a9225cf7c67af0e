/* The functions of _int8.c. */

#include "../maps/_kernel.h"

int mapreuse_has_int8_products(void);
int64_t mapreuse_compute_int8(const compute_arguments *layer, float *memory);
int64_t mapreuse_apply_int8(const apply_arguments *layer, float *memory);
