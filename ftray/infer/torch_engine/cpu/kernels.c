/* One engine step on a CPU: linear layers with the adapters of their rows, norms, rotary positions, attention. Each reads
 * what is large (weights, adapter factors, keys and values) once, in place, and has its threads do several operations
 * while they are awake. Everything is float32 and contiguous; factors may be bfloat16. A row's result does not depend on
 * the other rows, nor on the number of threads.
 */
#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
/* An innermost loop of its own: inlined into all that surrounds it, gcc keeps some of its sums in memory. */
#define APART static __attribute__((noinline))
#ifdef __AVX512F__
#define LANES 16
#define MOST_ROWS 8 /* that are multiplied at once: as many as there are registers for their sums */
#else
#define LANES 8
#define MOST_ROWS 2
#endif
#define COLUMNS 32                /* of weights that lie side by side, and that a thread computes at a time */
#define VECTORS (COLUMNS / LANES)
#define CHUNK 64        /* rows that a thread computes at a time */
#define MOST_LINES 1536 /* of adapters that are fetched while a block of weights is multiplied */
#define LINE 64         /* bytes of the cache */
/* Arrays of a known size stay in registers; of one that only the caller knows they would not. */
#define MOST_SUMS 16
#define MOST_TOKENS (MOST_SUMS / VECTORS) /* of an adapter that are computed at once */
#define MOST_SEGMENTS 8 /* of a group's layers */
#define MOST_HEAD (512 / LANES)
#define QUERY_FLOATS 8192 /* of a prompt's queries that are computed at once */
#define MOST_QUERIES 128
#define MOST_SHARING 4               /* query heads that read a key head at once */
#define MOST_WIDTH (LANES == 16 ? 4 : 2) /* vectors of each that are summed at once */

typedef int64_t i64;
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef uint32_t Wide __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Narrow __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(sizeof(uint16_t))));

/* Number j of a vector that takes every other M of two vectors' numbers, from the first on. */
#define FIRST(j, M) ((j) / (M) * 2 * (M) + (j) % (M))
#define SECOND(j, M) (FIRST(j, M) + (M))
#if LANES == 16
#define ALL(OF, M) \
    (Wide) { \
        OF(0, M), OF(1, M), OF(2, M), OF(3, M), OF(4, M), OF(5, M), OF(6, M), OF(7, M), OF(8, M), OF(9, M), OF(10, M), \
            OF(11, M), OF(12, M), OF(13, M), OF(14, M), OF(15, M) \
    }
#else
#define ALL(OF, M) \
    (Wide) { OF(0, M), OF(1, M), OF(2, M), OF(3, M), OF(4, M), OF(5, M), OF(6, M), OF(7, M) }
#endif

/* The sums of n vectors, n a power of 2 up to LANES, at the places 0 to n - 1: again and again halves (of halves) are added,
 * those of two vectors at once while there are two. Overwrites v. */
INLINE Vector sums_of(Vector *v, int n) {
#define ADD_HALVES(M) \
    if (M <= LANES / 2) { \
        for (int i = 0; i < (n + 1) / 2; i++) { \
            const Vector a = v[n > 1 ? 2 * i : i], b = v[n > 1 ? 2 * i + 1 : i]; \
            v[i] = __builtin_shuffle(a, b, ALL(FIRST, M)) + __builtin_shuffle(a, b, ALL(SECOND, M)); \
        } \
        n = (n + 1) / 2; \
    }
    ADD_HALVES(8)
    ADD_HALVES(4)
    ADD_HALVES(2)
    ADD_HALVES(1)
    return v[0];
}

INLINE float sum_of(Vector v) { return sums_of(&v, 1)[0]; }

INLINE float dot(const float *restrict a, const float *restrict b, i64 n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* e^x within 2 ulp (Cephes' polynomial), in a form that vectorises. NaN stays NaN. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 89.0f ? 89.0f : x; /* of which the power below is infinite */
    float k = rintf(x * 1.44269504088896341f);
    float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)k + 127) << 23};
    return p * power.value;
}

/* out[t] = x[t] / rms(x[t]) * weight, of T rows of n. By all threads of a team, that wait for each other. */
INLINE void norm_rows(const float *x, const float *weight, float *out, i64 T, i64 n, float epsilon) {
#pragma omp for schedule(static)
    for (i64 t = 0; t < T; t++) {
        const float *restrict row = x + t * n;
        float *restrict to = out + t * n;
        float scale = 1.0f / sqrtf(dot(row, row, n) / n + epsilon);
#pragma omp simd
        for (i64 i = 0; i < n; i++) to[i] = row[i] * scale * weight[i];
    }
}

void rms_norm(const float *x, const float *weight, float *out, i64 T, i64 n, double epsilon) {
#pragma omp parallel
    norm_rows(x, weight, out, T, n, epsilon);
}

/* gate = silu(gate) * up. */
INLINE void silu_times(float *restrict gate, const float *restrict up, i64 n) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

/* heads: [T, H + 2K, D], queries, keys, values. Turns queries and keys by their positions' angles, in place, and copies
 * keys and values to place slots[t] of the cache [places, 2, K, D], if there is one. cosine, sine: [T, D], the sine's
 * first half negated. */
void rotate_and_write_kv(float *heads, const float *cosine, const float *sine, i64 T, i64 H, i64 K, i64 D, float *cache,
                     const i64 *slots) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++) {
        float *token = heads + t * (H + 2 * K) * D;
        const float *restrict c = cosine + t * D, *restrict s = sine + t * D;
        i64 half = D / 2;
        for (i64 head = 0; head < H + K; head++) {
            float *restrict first = token + head * D, *restrict second = first + half;
#pragma omp simd
            for (i64 i = 0; i < half; i++) {
                float a = first[i], b = second[i];
                first[i] = a * c[i] + b * s[i];
                second[i] = b * c[half + i] + a * s[half + i];
            }
        }
        if (cache) memcpy(cache + slots[t] * 2 * K * D, token + H * D, 2 * K * D * sizeof(float));
    }
}

/* result[g] = shrink[g] * result[g] + sum over `some` tokens of weights[g, t] * values[t], for `width` vectors of each head.
 * Meanwhile the same places of `next` are fetched. */
INLINE void add_values(const float *values, const float *next, i64 some, i64 token, float (*weights)[LANES],
                       const float *shrink, float *result, i64 D, int heads, int width) {
    Vector sums[MOST_SHARING][MOST_WIDTH];
    for (int g = 0; g < heads; g++)
        for (int w = 0; w < width; w++) sums[g][w] = *(Vector *)(result + g * D + w * LANES) * shrink[g];
    for (i64 t = 0; t < some; t++)
        for (int w = 0; w < width; w++) {
            const Vector value = *(const Vector *)(values + t * token + w * LANES);
            if (w * LANES % (LINE / 4) == 0) __builtin_prefetch(next + t * token + w * LANES, 0, 2);
            for (int g = 0; g < heads; g++) sums[g][w] += weights[g][t] * value;
        }
    for (int g = 0; g < heads; g++)
        for (int w = 0; w < width; w++) *(Vector *)(result + g * D + w * LANES) = sums[g][w];
}

/* Attention of `heads` query heads to `count` tokens that one page has of their key head, added to what the pages before
 * gave: `result` [heads, D], for the highest score so far, `most`, and the sum of weights, `total`. The softmax is kept up as
 * in Milakov and Gimelshein 2018, arXiv 1805.02867. W vectors make a head, a token's keys are `token` floats from the next
 * token's and `key_to_value` from its values. Meanwhile the places of these tokens in `next`, the page after, are fetched. */
INLINE void attend_to_page(const float *query, const float *keys, const float *next, i64 count, i64 token,
                           i64 key_to_value, i64 W, int heads, float scaling, float *most, float *total, float *result) {
    const i64 D = W * LANES;
    _Alignas(LINE) Vector scaled[MOST_SHARING][MOST_HEAD];
    for (int g = 0; g < heads; g++)
        for (i64 w = 0; w < W; w++) scaled[g][w] = *(const Vector *)(query + g * D + w * LANES) * scaling;
    for (i64 start = 0; start < count; start += LANES) {
        const i64 some = count - start < LANES ? count - start : LANES;
        _Alignas(LINE) Vector products[MOST_SHARING][LANES];
        _Alignas(LINE) float weights[MOST_SHARING][LANES];
        float shrink[MOST_SHARING];
        for (i64 t = 0; t < LANES; t++) {
            const float *key = keys + (start + (t < some ? t : some - 1)) * token;
            Vector product[MOST_SHARING];
            for (int g = 0; g < heads; g++) product[g] = (Vector){0};
            for (i64 w = 0; w < W; w++) {
                const Vector k = *(const Vector *)(key + w * LANES);
                if (w * LANES % (LINE / 4) == 0) __builtin_prefetch(next + (start + t) * token + w * LANES, 0, 2);
                for (int g = 0; g < heads; g++) product[g] += k * scaled[g][w];
            }
            for (int g = 0; g < heads; g++) products[g][t] = product[g];
        }
        for (int g = 0; g < heads; g++) {
            *(Vector *)weights[g] = sums_of(products[g], LANES);
            for (i64 t = some; t < LANES; t++) weights[g][t] = -FLT_MAX;
            float highest = most[g];
            for (int t = 0; t < LANES; t++) highest = weights[g][t] > highest ? weights[g][t] : highest;
            shrink[g] = exponential(most[g] - highest);
            most[g] = highest;
#pragma omp simd
            for (int t = 0; t < LANES; t++) weights[g][t] = exponential(weights[g][t] - highest);
            for (i64 t = some; t < LANES; t++) weights[g][t] = 0;
            total[g] = total[g] * shrink[g] + sum_of(*(const Vector *)weights[g]);
        }
        i64 w = 0;
#define ADD_VALUES(WIDTH) \
    add_values(keys + start * token + key_to_value + w * LANES, next + start * token + key_to_value + w * LANES, some, token, \
               weights, shrink, result + w * LANES, D, heads, WIDTH)
        for (; w + MOST_WIDTH <= W; w += MOST_WIDTH) ADD_VALUES(MOST_WIDTH);
        for (; w < W; w++) ADD_VALUES(1);
    }
}

/* By widths and numbers of heads that are known when compiled. */
#define ATTEND_AS(NAME, W, HEADS) \
    APART void attend_##NAME##_##HEADS(const float *query, const float *keys, const float *next, i64 count, i64 token, \
                                       i64 key_to_value, i64 width, float scaling, float *most, float *total, float *result) { \
        attend_to_page(query, keys, next, count, token, key_to_value, W, HEADS, scaling, most, total, result); \
    }
#define ATTEND_BY_HEADS(NAME, W) ATTEND_AS(NAME, W, 1) ATTEND_AS(NAME, W, 2) ATTEND_AS(NAME, W, 3) ATTEND_AS(NAME, W, 4)
ATTEND_BY_HEADS(64, 64 / LANES)
ATTEND_BY_HEADS(128, 128 / LANES)
ATTEND_BY_HEADS(any, width)
typedef void AttendToPage(const float *, const float *, const float *, i64, i64, i64, i64, float, float *, float *, float *);
static AttendToPage *const ATTEND[3][MOST_SHARING] = {{attend_64_1, attend_64_2, attend_64_3, attend_64_4},
                                                      {attend_128_1, attend_128_2, attend_128_3, attend_128_4},
                                                      {attend_any_1, attend_any_2, attend_any_3, attend_any_4}};

/* Attention of one token of each of n sequences to the tokens that the cache has of it, its own included.
 * queries: [n, H, D], `stride` floats from one sequence to the next; cache: [pages, page_tokens, 2, K, D]; pages: [n, P];
 * out: [n, H, D]; D a multiple of 16, lengths of at least 1. A thread takes whole key heads of sequences, about as many pages as the others. */
void attend_to_pages(const float *queries, const float *cache, const i64 *pages, const i64 *lengths, float *out, i64 n,
                     i64 stride, i64 P, i64 page_tokens, i64 H, i64 K, i64 D, double scaling) {
    const i64 token = 2 * K * D, page_size = page_tokens * token, sharing = H / K;
    AttendToPage *const *attend = ATTEND[D == 64 ? 0 : D == 128 ? 1 : 2];
    i64 all = 0;
    for (i64 s = 0; s < n; s++) all += K * ((lengths[s] + page_tokens - 1) / page_tokens);
#pragma omp parallel
    {
        const i64 threads = omp_get_num_threads(), thread = omp_get_thread_num();
        float most[sharing], total[sharing];
        i64 before = 0;
        for (i64 item = 0; item < n * K; item++) {
            const i64 s = item / K, k = item % K, num_pages = (lengths[s] + page_tokens - 1) / page_tokens;
            const i64 middle = 2 * before + num_pages; /* twice the pages before this item's middle */
            before += num_pages;
            if (middle * threads / (2 * all) != thread) continue;
            const i64 next_item = item + 1 < n * K ? item + 1 : item;
            const float *following = cache + pages[next_item / K * P] * page_size + next_item % K * D;
            const float *query = queries + s * stride + k * sharing * D;
            float *result = out + (s * H + k * sharing) * D;
            memset(result, 0, sharing * D * sizeof(float));
            for (i64 h = 0; h < sharing; h++) most[h] = -FLT_MAX, total[h] = 0;
            for (i64 p = 0; p < num_pages; p++) {
                const float *keys = cache + pages[s * P + p] * page_size + k * D;
                const float *next = p + 1 < num_pages ? cache + pages[s * P + p + 1] * page_size + k * D : following;
                const i64 left = lengths[s] - p * page_tokens, count = left < page_tokens ? left : page_tokens;
                for (i64 h = 0, heads; h < sharing; h += heads) {
                    heads = sharing - h < MOST_SHARING ? sharing - h : MOST_SHARING;
                    attend[heads - 1](query + h * D, keys, next, count, token, K * D, D / LANES, scaling, most + h, total + h,
                                      result + h * D);
                }
            }
            for (i64 h = 0; h < sharing; h++)
                for (i64 i = 0; i < D; i++) result[h * D + i] /= total[h];
        }
    }
}

/* Where B of one layer lies in its output's block. */
typedef struct {
    i64 output, row, num_rows, column, num_columns;
} Segment;

/* The factors that all slots of a slab have of one group of layers, float32 or, if `half`, bfloat16. a: [S, R, I];
 * bt[o]: [S, blocks of COLUMNS columns, rows[o], COLUMNS], zero outside the segments. Rows of all outputs together are the R
 * rows of a, in order. */
typedef struct {
    i64 in_features, rank, num_segments, half;
    const void *a, *bt[2];
    i64 rows[2], blocks[2];
    Segment segments[MOST_SEGMENTS];
} Slots;

typedef struct {
    i64 slot, start, count;
} Stretch;

/* Number i of `factors`, and LANES of them; bfloat16 is the upper half of a float32. `half` is known when compiled. */
INLINE float factor(const void *factors, i64 i, int half) {
    if (!half) return ((const float *)factors)[i];
    union { uint32_t bits; float value; } wide = {(uint32_t)((const uint16_t *)factors)[i] << 16};
    return wide.value;
}

INLINE const char *place_of(const void *factors, i64 i, int half) { return (const char *)factors + i * (half ? 2 : 4); }

INLINE Vector factors_from(const void *factors, i64 i, int half) {
    if (!half) return *(const Vector *)((const float *)factors + i);
    union { Wide bits; Vector values; } wide;
#ifdef __AVX512F__ /* one instruction, of which gcc 12 makes four */
    wide.bits = (Wide)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)((const uint16_t *)factors + i))) << 16;
#else
    wide.bits = __builtin_convertvector(*(const Narrow *)((const uint16_t *)factors + i), Wide) << 16;
#endif
    return wide.values;
}

/* to[t, k] = row k of `a` (from number `first` on) times x[t], of `rows` rows and `tokens` tokens. */
INLINE void reduce_any(const void *a, i64 first, i64 I, const float *x, float *to, i64 R, int rows, int tokens, int half) {
    Vector sums[MOST_SUMS];
    for (int n = 0; n < rows * tokens; n++) sums[n] = (Vector){0};
    for (i64 i = 0; i + LANES <= I; i += LANES)
        for (int k = 0; k < rows; k++) {
            Vector some = factors_from(a, first + k * I + i, half);
            if (tokens < 4) __builtin_prefetch(place_of(a, first + (2 * rows + k) * I + i, half), 0, 2);
            for (int t = 0; t < tokens; t++) sums[k * tokens + t] += some * *(const Vector *)(x + t * I + i);
        }
    float totals[MOST_SUMS];
    for (int n = 0; n < rows * tokens; n += LANES) {
        const int count = rows * tokens - n < LANES ? rows * tokens - n : LANES;
        const Vector some = sums_of(sums + n, count);
        for (int i = 0; i < count; i++) totals[n + i] = some[i];
    }
    for (int k = 0; k < rows; k++)
        for (int t = 0; t < tokens; t++) {
            float sum = totals[k * tokens + t];
            for (i64 i = I - I % LANES; i < I; i++) sum = fmaf(factor(a, first + k * I + i, half), x[t * I + i], sum);
            to[t * R + k] = sum;
        }
}

#define REDUCE_OF(ROWS, TOKENS) \
    APART void reduce_##ROWS##_##TOKENS(const void *a, i64 first, i64 I, const float *x, float *to, i64 R, int half) { \
        if (half) reduce_any(a, first, I, x, to, R, ROWS, TOKENS, 1); \
        else reduce_any(a, first, I, x, to, R, ROWS, TOKENS, 0); \
    }
REDUCE_OF(1, 1)
REDUCE_OF(4, 1)
REDUCE_OF(4, 2)
REDUCE_OF(4, 4)

/* The adapters of one slab in a multiplication. reduced: room for A x, [tokens of all stretches, R]. */
typedef struct {
    const Slots *slots;
    const Stretch *stretches;
    i64 num_stretches;
    float *reduced;
} Adapters;

/* Rows of an adapter's A. */
typedef struct {
    i64 first, end;
} Rows;

/* Those that the outputs from `output` to `end` have. */
INLINE Rows rows_of(const Slots *slots, i64 output, i64 end) {
    Rows rows = {0, 0};
    for (i64 o = 0; o < end; o++) {
        if (o < output) rows.first += slots->rows[o];
        rows.end += slots->rows[o];
    }
    return rows;
}

/* A thread's share of them in stretch g: of all stretches' fours as many as the others. */
INLINE Rows share_of(const Adapters *a, i64 g, Rows rows, i64 thread, i64 threads) {
    const i64 fours = (rows.end - rows.first + 3) / 4, items = a->num_stretches * fours;
    i64 first = items * thread / threads - g * fours, end = items * (thread + 1) / threads - g * fours;
    first = first < 0 ? 0 : first < fours ? first : fours;
    end = end < first ? first : end < fours ? end : fours;
    const i64 last = rows.first + end * 4;
    return (Rows){rows.first + first * 4, last < rows.end ? last : rows.end};
}

/* This thread's share of A x, of the rows of A that the outputs from `output` to `end` have. */
INLINE void reduce_share(const Adapters *a, const float *x, i64 output, i64 end, i64 thread, i64 threads) {
    const Slots *slots = a->slots;
    const i64 I = slots->in_features, R = slots->rank;
    const Rows rows = rows_of(slots, output, end);
    i64 token = 0;
    for (i64 g = 0; g < a->num_stretches; token += a->stretches[g].count, g++) {
        const Rows share = share_of(a, g, rows, thread, threads);
        const i64 count = a->stretches[g].count;
        for (i64 r = share.first; r < share.end; r += 4) {
            const i64 first = (a->stretches[g].slot * R + r) * I;
            i64 t = 0;
#define REDUCE(ROW, NUM_ROWS, TOKENS) \
    reduce_##NUM_ROWS##_##TOKENS(slots->a, first + (ROW) * I, I, x + (a->stretches[g].start + t) * I, \
                                 a->reduced + (token + t) * R + r + (ROW), R, slots->half)
            if (rows.end - r >= 4) {
                for (; t + 4 <= count; t += 4) REDUCE(0, 4, 4); /* prompts: 16 sums stay in registers */
                for (; t + 2 <= count; t += 2) REDUCE(0, 4, 2);
                if (t < count) REDUCE(0, 4, 1);
            } else
                for (; t < count; t++)
                    for (i64 k = 0; k < rows.end - r; k++) REDUCE(k, 1, 1);
        }
    }
}

/* What a thread reads of A in the next multiplication, of the first `num_outputs` outputs, from where it is fetched on. */
typedef struct {
    const Adapters *adapters; /* of the first slab that is left */
    i64 num_adapters, num_outputs, stretch, line;
} Coming;

/* Puts up to `most` of the lines of the cache that it lies in behind the first n of `lines`, which may be NULL. Returns how
 * many there are then. */
INLINE i64 fetch_coming(Coming *c, i64 thread, i64 threads, const char **lines, i64 n, i64 most) {
    const i64 until = n + most;
    while (c->num_adapters && n < until) {
        const Adapters *a = c->adapters;
        if (c->stretch == a->num_stretches) {
            *c = (Coming){a + 1, c->num_adapters - 1, c->num_outputs};
            continue;
        }
        const Slots *slots = a->slots;
        const Rows share = share_of(a, c->stretch, rows_of(slots, 0, c->num_outputs), thread, threads);
        const i64 row = (a->stretches[c->stretch].slot * slots->rank + share.first) * slots->in_features;
        const char *from = place_of(slots->a, row, slots->half);
        const i64 all = (share.end - share.first) * slots->in_features * (slots->half ? 2 : 4) / LINE;
        const i64 some = all - c->line < until - n ? all - c->line : until - n;
        if (lines)
            for (i64 i = 0; i < some; i++) lines[n + i] = from + (c->line + i) * LINE;
        n += some;
        c->line += some;
        if (c->line == all) c->stretch++, c->line = 0;
    }
    return n;
}

/* What one adapter adds to one block, in one segment of it: to `width` columns of the sums of `tokens` rows. bt: [num_rows,
 * COLUMNS], from the first of its columns on; h: A x of its tokens, R floats from one to the next. */
typedef struct {
    const void *bt;
    const float *h;
    float *to;
    i64 num_rows, R, width, tokens;
    int half, is_first;
} Piece;

/* Of what the adapters add to one block of columns, in rows `row` to `end`. Returns how many. to: [end - row, COLUMNS]. */
INLINE i64 pieces_of(const Adapters *a, i64 output, i64 block, i64 row, i64 end, float *to, Piece *pieces) {
    const Slots *slots = a->slots;
    const i64 R = slots->rank, first = block * COLUMNS, slot_size = slots->blocks[output] * slots->rows[output] * COLUMNS;
    const i64 row_of_a = rows_of(slots, output, output).first;
    i64 n = 0;
    for (i64 s = 0; s < slots->num_segments; s++) {
        const Segment *segment = &slots->segments[s];
        const i64 from = segment->column > first ? segment->column - first : 0, stop = segment->column + segment->num_columns;
        const i64 width = (stop < first + COLUMNS ? stop - first : COLUMNS) - from;
        if (segment->output != output || width <= 0) continue;
        const i64 offset = (block * slots->rows[output] + segment->row) * COLUMNS + from;
        const float *h = a->reduced + row_of_a + segment->row;
        for (i64 g = 0; g < a->num_stretches; h += a->stretches[g].count * R, g++) {
            const Stretch *stretch = &a->stretches[g];
            const i64 begin = stretch->start > row ? stretch->start : row, last = stretch->start + stretch->count;
            const i64 tokens = (last < end ? last : end) - begin;
            if (tokens <= 0) continue;
            pieces[n++] = (Piece){place_of(slots->bt[output], stretch->slot * slot_size + offset, slots->half),
                                  h + (begin - stretch->start) * R, to + (begin - row) * COLUMNS + from, segment->num_rows, R,
                                  width, tokens, slots->half, begin == stretch->start};
        }
    }
    return n;
}

/* The lines of the cache that have a piece's factors (an adapter's later rows find them fetched). Returns how many there are. */
INLINE i64 lines_of(const Piece *p, const char **lines, i64 n) {
    if (!p->is_first) return n;
    const i64 all = p->num_rows * COLUMNS * (p->half ? 2 : 4) / LINE, some = all < MOST_LINES - n ? all : MOST_LINES - n;
    for (i64 i = 0; i < some; i++) lines[n + i] = (const char *)p->bt + i * LINE;
    return n + some;
}

/* to[t] += B (A x)[t] for W vectors of columns, from number `column` of the piece on, and `tokens` tokens from number t on. */
INLINE void expand_any(const Piece *p, i64 column, i64 t, int W, int tokens, int half) {
    const float *h = p->h + t * p->R;
    const i64 R = p->R;
    float *to = p->to + t * COLUMNS + column;
    Vector sums[MOST_SUMS];
    for (int k = 0; k < tokens; k++)
        for (int w = 0; w < W; w++) sums[k * W + w] = *(const Vector *)(to + k * COLUMNS + w * LANES);
    for (i64 r = 0; r < p->num_rows; r++)
        for (int w = 0; w < W; w++) {
            const Vector some = factors_from(p->bt, r * COLUMNS + column + w * LANES, half);
            for (int k = 0; k < tokens; k++) sums[k * W + w] += h[k * R + r] * some;
        }
    for (int k = 0; k < tokens; k++)
        for (int w = 0; w < W; w++) *(Vector *)(to + k * COLUMNS + w * LANES) = sums[k * W + w];
}

#define EXPAND_TOKENS(W, HALF) \
    { \
        i64 t = 0; \
        for (; t + MOST_TOKENS <= p->tokens; t += MOST_TOKENS) expand_any(p, column, t, W, MOST_TOKENS, HALF); \
        for (; t + 4 <= p->tokens; t += 4) expand_any(p, column, t, W, 4, HALF); \
        for (; t + 2 <= p->tokens; t += 2) expand_any(p, column, t, W, 2, HALF); \
        if (t < p->tokens) expand_any(p, column, t, W, 1, HALF); \
    }
#define EXPAND_OF(NAME, W) \
    APART void expand_##NAME(const Piece *p, i64 column) { \
        if (p->half) EXPAND_TOKENS(W, 1) \
        else EXPAND_TOKENS(W, 0) \
    }
EXPAND_OF(block, VECTORS)
EXPAND_OF(vector, 1)

/* to[t] += B (A x)[t] */
INLINE void add_piece(const Piece *p) {
    i64 i = 0;
    if (p->width == COLUMNS) expand_block(p, 0), i = COLUMNS;
    for (; i + LANES <= p->width; i += LANES) expand_vector(p, i);
    for (; i < p->width; i++)
        for (i64 t = 0; t < p->tokens; t++)
            for (i64 r = 0; r < p->num_rows; r++)
                p->to[t * COLUMNS + i] += p->h[t * p->R + r] * factor(p->bt, r * COLUMNS + i, p->half);
}

/* Linear layers of one input side by side. weight: [blocks of COLUMNS outputs, in, COLUMNS], bias: [blocks, COLUMNS], zero
 * behind the last output. */
typedef struct {
    i64 in, out;
    const float *weight, *bias;
} Layer;

/* What is fetched while a block is multiplied: the block after it, `per_input` lines with each of `num_inputs` inputs, and
 * adapters' factors, one line with each of the first inputs. */
typedef struct {
    const float *weight;
    i64 num_inputs;
    int per_input;
    const char *const *lines;
    i64 num_lines;
} Ahead;

/* to[t] = bias + W x[t] of one block, for `rows` rows; each sum is made from the first input to the last. */
INLINE void multiply_rows(const float *weight, const float *bias, const float *x, float *to, i64 I, int rows,
                          const Ahead *ahead) {
    const int per_input = ahead->per_input;
    const i64 num_inputs = ahead->num_inputs, num_lines = ahead->num_lines;
    const char *const *lines = ahead->lines;
    const float *next = ahead->weight;
    Vector sums[MOST_ROWS * VECTORS];
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < VECTORS; v++) sums[t * VECTORS + v] = *(const Vector *)(bias + v * LANES);
    for (i64 i = 0; i < I; i++) {
        Vector some[VECTORS];
        for (int v = 0; v < VECTORS; v++) some[v] = *(const Vector *)(weight + i * COLUMNS + v * LANES);
        if (i < num_inputs) {
            __builtin_prefetch(next, 0, 2);
            if (per_input > 1) __builtin_prefetch(next + LINE / sizeof(float), 0, 2);
            next += per_input * (LINE / sizeof(float));
        }
        if (i < num_lines) __builtin_prefetch(lines[i], 0, 2);
        for (int t = 0; t < rows; t++)
            for (int v = 0; v < VECTORS; v++) sums[t * VECTORS + v] += some[v] * x[t * I + i];
    }
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < VECTORS; v++) *(Vector *)(to + t * COLUMNS + v * LANES) = sums[t * VECTORS + v];
}

#define MULTIPLY_ROWS(NUM_ROWS) \
    APART void multiply_##NUM_ROWS(const float *weight, const float *bias, const float *x, float *to, i64 I, \
                                   const Ahead *ahead) { \
        multiply_rows(weight, bias, x, to, I, NUM_ROWS, ahead); \
    }
MULTIPLY_ROWS(1)
MULTIPLY_ROWS(2)
#ifdef __AVX512F__
MULTIPLY_ROWS(4)
MULTIPLY_ROWS(8)
#endif

/* to[t] = bias + W x[t] of one block, for `rows` rows, as many at once as there can be. */
INLINE void multiply_all(const float *weight, const float *bias, const float *x, float *to, i64 I, i64 rows, Ahead ahead) {
    i64 t = 0;
#define MULTIPLY(NUM_ROWS) \
    for (; rows - t >= NUM_ROWS; t += NUM_ROWS) { \
        multiply_##NUM_ROWS(weight, bias, x + t * I, to + t * COLUMNS, I, &ahead); \
        ahead.weight += I * ahead.per_input * (LINE / sizeof(float)), ahead.num_inputs -= I; \
        ahead.lines += I, ahead.num_lines -= I; \
    }
#ifdef __AVX512F__
    MULTIPLY(8)
    MULTIPLY(4)
#endif
    MULTIPLY(2)
    MULTIPLY(1)
}

typedef struct {
    const Layer *layer;
    i64 number;
} Block;

INLINE const float *weight_of(Block block) { return block.layer->weight + block.number * block.layer->in * COLUMNS; }

/* A block's weights come from memory once for all rows: while the first rows are multiplied, and the second where there
 * are some, the block after it is fetched, or as much of a larger one as two lines with each input make. */
INLINE void multiply_block(Block block, const float *x, i64 row, i64 end, float *to, Block after, const char *const *lines,
                           i64 num_lines) {
    const i64 I = block.layer->in, lines_after = after.layer->in * COLUMNS * sizeof(float) / LINE;
    const int per_input = lines_after <= (end - row >= 2 * MOST_ROWS ? 2 : 1) * I ? 1 : 2;
    const Ahead ahead = {weight_of(after), lines_after / per_input, per_input, lines, num_lines};
    multiply_all(weight_of(block), block.layer->bias + block.number * COLUMNS, x + row * I, to, I, end - row, ahead);
}

/* to[t] = W x[t] of one block that is in a near cache. */
INLINE void multiply_cached(const float *weight, const float *x, float *to, i64 I, i64 rows) {
    static const float nothing[COLUMNS];
    multiply_all(weight, nothing, x, to, I, rows, (Ahead){weight});
}

/* Scores of the first `seen` of COLUMNS keys (none if negative, all if more) become weights, the others' 0; the softmax is
 * kept up as in `attend_to_page`. Returns by what the sums so far shrink. */
INLINE float weigh(float *scores, i64 seen, float *most, float *total) {
    float highest = *most, sum = 0;
#pragma omp simd reduction(max : highest)
    for (i64 j = 0; j < COLUMNS; j++) {
        const float score = j < seen ? scores[j] : -FLT_MAX;
        highest = score > highest ? score : highest;
    }
    const float shrink = exponential(*most - highest);
#pragma omp simd reduction(+ : sum)
    for (i64 j = 0; j < COLUMNS; j++) {
        scores[j] = j < seen ? exponential(scores[j] - highest) : 0;
        sum += scores[j];
    }
    *most = highest;
    *total = *total * shrink + sum;
    return shrink;
}

/* What the cache has of one key head of one sequence, in one layer. */
typedef struct {
    const float *keys; /* of this head, of the cache's first token */
    const i64 *pages;
    i64 page_tokens;
    i64 token;        /* floats from a token to the next */
    i64 key_to_value; /* floats from a token's key to its value */
    i64 D;
} Kept;

/* COLUMNS tokens from number `start` on, as `multiply_cached` takes weights: keys [D, COLUMNS], values [blocks of COLUMNS of D,
 * COLUMNS tokens, COLUMNS]; zero from token `end` on. */
INLINE void pack_tokens(const Kept *kept, i64 start, i64 end, float *restrict keys, float *restrict values) {
    const i64 D = kept->D;
    for (i64 j = 0; j < COLUMNS; j++) {
        float *to = values + j * COLUMNS;
        if (start + j >= end) {
            for (i64 d = 0; d < D; d++) keys[d * COLUMNS + j] = 0;
            for (i64 d = 0; d < D; d++) to[d / COLUMNS * COLUMNS * COLUMNS + d % COLUMNS] = 0;
            continue;
        }
        const i64 page = kept->pages[(start + j) / kept->page_tokens], place = (start + j) % kept->page_tokens;
        const float *from = kept->keys + (page * kept->page_tokens + place) * kept->token;
        for (i64 d = 0; d < D; d++) keys[d * COLUMNS + j] = from[d];
        for (i64 d = 0; d < D; d += LANES)
            *(Vector *)(to + d / COLUMNS * COLUMNS * COLUMNS + d % COLUMNS) = *(const Vector *)(from + kept->key_to_value + d);
    }
}

/* A thread's room, 226 KiB of its stack. */
typedef struct {
    _Alignas(LINE) float query[QUERY_FLOATS], result[QUERY_FLOATS];
    _Alignas(LINE) float scores[MOST_QUERIES * COLUMNS], products[MOST_QUERIES * COLUMNS];
    _Alignas(LINE) float keys[MOST_HEAD * LANES * COLUMNS], values[MOST_HEAD * LANES * COLUMNS];
    float most[MOST_QUERIES], total[MOST_QUERIES], shrink[MOST_QUERIES];
} Tile;

/* result = attention of `rows` queries, of which query i sees the first seen + (first + i) / sharing tokens: COLUMNS of them
 * at a time (Dao et al. 2022, arXiv 2205.14135). */
INLINE void attend_tile(Tile *tile, const Kept *kept, i64 rows, i64 first, i64 sharing, i64 seen) {
    const i64 D = kept->D, end = seen + (first + rows - 1) / sharing;
    memset(tile->result, 0, rows * D * sizeof(float));
    for (i64 i = 0; i < rows; i++) tile->most[i] = -FLT_MAX, tile->total[i] = 0;
    for (i64 start = 0; start < end; start += COLUMNS) {
        pack_tokens(kept, start, end, tile->keys, tile->values);
        multiply_cached(tile->keys, tile->query, tile->scores, D, rows);
        for (i64 i = 0; i < rows; i++)
            tile->shrink[i] = weigh(tile->scores + i * COLUMNS, seen + (first + i) / sharing - start, &tile->most[i],
                                    &tile->total[i]);
        for (i64 d = 0; d < D; d += COLUMNS) {
            const i64 width = D - d < COLUMNS ? D - d : COLUMNS;
            multiply_cached(tile->values + d * COLUMNS, tile->scores, tile->products, COLUMNS, rows);
            for (i64 i = 0; i < rows; i++)
                for (i64 w = 0; w < width; w += LANES) {
                    Vector *sum = (Vector *)(tile->result + i * D + d + w);
                    *sum = *sum * tile->shrink[i] + *(const Vector *)(tile->products + i * COLUMNS + w);
                }
        }
    }
    for (i64 i = 0; i < rows; i++)
        for (i64 d = 0; d < D; d++) tile->result[i * D + d] /= tile->total[i];
}

/* Where a prompt's tokens are among the queries, and how many are before the first of them in the cache. */
typedef struct {
    i64 row, num_rows, before;
} Prompt;

/* Attention of tokens of n prompts to what the cache has of their sequences, each up to itself. queries, cache, pages, out as
 * for `attend_to_pages`. A tile is queries of one key head; thread i takes numbers i, i + threads, and so on.
 * Values must be finite: a token that is not seen has the weight 0. */
void attend_to_prompts(const float *queries, const float *cache, const i64 *pages, const Prompt *prompts, float *out, i64 n,
                       i64 stride, i64 P, i64 page_tokens, i64 H, i64 K, i64 D, double scaling) {
    const i64 sharing = H / K, most_rows = QUERY_FLOATS / D < MOST_QUERIES ? QUERY_FLOATS / D : MOST_QUERIES;
    const float scale = (float)scaling;
#pragma omp parallel
    {
        Tile tile;
        const i64 threads = omp_get_num_threads(), thread = omp_get_thread_num();
        i64 number = 0;
        for (i64 p = 0; p < n; p++) {
            const Prompt prompt = prompts[p];
            for (i64 first = 0; first < prompt.num_rows * sharing; first += most_rows)
                for (i64 k = 0; k < K; k++) {
                    if (number++ % threads != thread) continue;
                    const Kept kept = {cache + k * D, pages + p * P, page_tokens, 2 * K * D, K * D, D};
                    const i64 left = prompt.num_rows * sharing - first, rows = left < most_rows ? left : most_rows;
                    for (i64 i = 0; i < rows; i++) {
                        const i64 t = prompt.row + (first + i) / sharing, h = k * sharing + (first + i) % sharing;
                        for (i64 d = 0; d < D; d++) tile.query[i * D + d] = queries[t * stride + h * D + d] * scale;
                    }
                    attend_tile(&tile, &kept, rows, first, sharing, prompt.before + 1);
                    for (i64 i = 0; i < rows; i++) {
                        const i64 t = prompt.row + (first + i) / sharing, h = k * sharing + (first + i) % sharing;
                        memcpy(out + (t * H + h) * D, tile.result + i * D, D * sizeof(float));
                    }
                }
        }
    }
}

INLINE void write_row(const float *from, const float *residual, float *to, i64 width) {
    if (residual)
        for (i64 i = 0; i < width; i++) to[i] = from[i] + residual[i];
    else
        for (i64 i = 0; i < width; i++) to[i] = from[i];
}

/* y = W x + b + B A x + residual, of T rows. x: [T, in]; y, residual: [T, out]; no residual: NULL. With a
 * `norm_weight` x is normed first, into `normed` [T, in]. With two layers
 * y = silu(of the first) * of the second. Adapters are those of the outputs from number `output` on; each slab's A x is
 * made first, B is read while its columns of W x are in the nearest cache. A thread fetches a block ahead: at the end the first
 * that it will multiply of the layer `next`, which may be NULL, and what it will read of A of the adapters there, for few
 * rows: fetching is slower than multiplying them. Beside two layers, with twice the B, it is no gain. */
void linear(const Layer *layers, i64 num_layers, const Layer *next, i64 num_next, const Adapters *next_adapters,
            i64 num_next_adapters, i64 output, const Adapters *adapters, i64 num_adapters, const float *x, i64 T,
            const float *norm_weight, double epsilon, float *normed, const float *residual, float *y) {
    const i64 out = layers[0].out, blocks = (out + COLUMNS - 1) / COLUMNS, chunks = (T + CHUNK - 1) / CHUNK;
#pragma omp parallel
    {
        const i64 threads = omp_get_num_threads(), thread = omp_get_thread_num(), items = blocks * chunks;
        if (norm_weight) norm_rows(x, norm_weight, normed, T, layers[0].in, epsilon);
        const float *inputs = norm_weight ? normed : x;
        for (i64 k = 0; k < num_adapters; k++)
            reduce_share(&adapters[k], inputs, output, output + num_layers, thread, threads);
        if (num_adapters) {
#pragma omp barrier
        }
        _Alignas(LINE) float results[2][CHUNK * COLUMNS];
        const char *lines[MOST_LINES];
        Piece pieces[CHUNK * MOST_SEGMENTS]; /* a row has one adapter at most */
        const i64 stop = items * (thread + 1) / threads;
        Coming coming = {next_adapters, T <= CHUNK && num_layers == 1 ? num_next_adapters : 0, num_next}, all_coming = coming;
        i64 left = fetch_coming(&all_coming, thread, threads, NULL, 0, INT64_MAX);
        Block following = {next};
        if (next) following.number = (next->out + COLUMNS - 1) / COLUMNS * thread / threads;
        for (i64 item = items * thread / threads; item < stop; item++) {
            const i64 block = item / chunks, row = item % chunks * CHUNK, column = block * COLUMNS;
            const i64 end = row + CHUNK < T ? row + CHUNK : T, width = out - column < COLUMNS ? out - column : COLUMNS;
            for (i64 l = 0; l < num_layers; l++) {
                const Block own = {&layers[l], block};
                const Block after = l + 1 < num_layers ? (Block){&layers[l + 1], block}
                                    : item + 1 < stop  ? (Block){layers, (item + 1) / chunks}
                                    : next             ? following
                                                       : own;
                i64 num_lines = 0, num_pieces = 0;
                for (i64 k = 0; k < num_adapters; k++)
                    num_pieces += pieces_of(&adapters[k], output + l, block, row, end, results[l], pieces + num_pieces);
                for (i64 p = 0; p < num_pieces; p++) num_lines = lines_of(&pieces[p], lines, num_lines);
                /* As late as it can be: it shares a near cache with the weights. */
                const i64 room = layers[l].in * (end - row >= 2 * MOST_ROWS ? 2 : 1) - num_lines;
                const i64 most = MOST_LINES - num_lines < room ? MOST_LINES - num_lines : room;
                const i64 now = left - (stop - 1 - item) * room;
                if (now > 0) {
                    const i64 behind = fetch_coming(&coming, thread, threads, lines, num_lines, now < most ? now : most);
                    left -= behind - num_lines, num_lines = behind;
                }
                multiply_block(own, inputs, row, end, results[l], after, lines, num_lines);
                for (i64 p = 0; p < num_pieces; p++) add_piece(&pieces[p]);
            }
            if (num_layers == 2) silu_times(results[0], results[1], (end - row) * COLUMNS);
            for (i64 t = row; t < end; t++) {
                const float *from = results[0] + (t - row) * COLUMNS;
                const i64 at = t * out + column;
                if (width == COLUMNS) write_row(from, residual ? residual + at : NULL, y + at, COLUMNS);
                else write_row(from, residual ? residual + at : NULL, y + at, width);
            }
        }
    }
}
