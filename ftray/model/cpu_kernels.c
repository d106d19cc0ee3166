/* One engine step on a CPU is a hundred matmuls with small operations between them. Each small operation finds its data
 * cold and its threads asleep; these do several at once, and read what is large (adapter factors, keys and values) once,
 * in place. Everything is float32 and contiguous; factors may be bfloat16. A row's result does not depend on the other
 * rows, nor on the number of threads.
 */
#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define COLUMNS 128 /* of an output that one thread adds to at a time */
/* Arrays of a known size stay in registers; of one that only the caller knows they would not. */
#define MOST_SUMS 16
#define MOST_HEAD_LANES 32

typedef int64_t i64;
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef uint32_t Wide __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Narrow __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(sizeof(uint16_t))));

INLINE float sum_of(Vector v) {
    float sums[LANES / 2];
    for (int i = 0; i < LANES / 2; i++) sums[i] = v[i] + v[i + LANES / 2];
    for (int n = LANES / 4; n > 0; n /= 2)
        for (int i = 0; i < n; i++) sums[i] += sums[i + n];
    return sums[0];
}

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

/* out[t] = x[t] / rms(x[t]) * weight, of T rows of n. */
void rms_norm(const float *x, const float *weight, float *out, i64 T, i64 n, double epsilon) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++) {
        const float *restrict row = x + t * n;
        float *restrict to = out + t * n;
        float scale = 1.0f / sqrtf(dot(row, row, n) / n + (float)epsilon);
#pragma omp simd
        for (i64 i = 0; i < n; i++) to[i] = row[i] * scale * weight[i];
    }
}

INLINE void silu_times_row(float *restrict gate, const float *restrict up, i64 n) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

/* gate = silu(gate) * up, of T rows of n. */
void silu_times(float *gate, const float *up, i64 T, i64 n) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++) silu_times_row(gate + t * n, up + t * n, n);
}

/* heads: [T, H + 2K, D], queries, keys, values. Turns queries and keys by their positions' angles, in place, and copies
 * keys and values to place slots[t] of the cache [places, 2, K, D], if there is one. cosine, sine: [T, D], the sine's
 * first half negated. */
void rotate_and_keep(float *heads, const float *cosine, const float *sine, i64 T, i64 H, i64 K, i64 D, float *cache,
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

/* One page of one sequence, for all heads; W vectors make a head. score: [H, page_tokens] of scratch. */
INLINE void attend_to_page(const float *query, const float *page, i64 count, i64 page_tokens, i64 H, i64 K, i64 W,
                           float scaling, float *score, float *most, float *total, float *result) {
    const i64 sharing = H / K, head = W * LANES, token = 2 * K * head;
    for (i64 k = 0, h = 0; k < K; k++)
        for (i64 end = h + sharing; h < end; h++) {
            float *weight = score + h * page_tokens, *to = result + h * head;
            const float *keys = page + k * head, *values = page + (K + k) * head;
            Vector turned[MOST_HEAD_LANES], sums[MOST_HEAD_LANES];
            for (i64 w = 0; w < W; w++) turned[w] = *(const Vector *)(query + h * head + w * LANES) * scaling;
            for (i64 t = 0; t < count; t++) {
                Vector products = turned[0] * *(const Vector *)(keys + t * token);
                for (i64 w = 1; w < W; w++) products += turned[w] * *(const Vector *)(keys + t * token + w * LANES);
                weight[t] = sum_of(products);
            }
            float highest = most[h], sum = 0;
            for (i64 t = 0; t < count; t++) highest = weight[t] > highest ? weight[t] : highest;
            float shrink = exponential(most[h] - highest);
#pragma omp simd
            for (i64 t = 0; t < count; t++) weight[t] = exponential(weight[t] - highest);
            for (i64 t = 0; t < count; t++) sum += weight[t];
            most[h] = highest;
            total[h] = total[h] * shrink + sum;
            for (i64 w = 0; w < W; w++) sums[w] = *(Vector *)(to + w * LANES) * shrink;
            for (i64 t = 0; t < count; t++)
                for (i64 w = 0; w < W; w++) sums[w] += weight[t] * *(const Vector *)(values + t * token + w * LANES);
            for (i64 w = 0; w < W; w++) *(Vector *)(to + w * LANES) = sums[w];
        }
}

/* Attention of one token of each of n sequences to the tokens that the cache has of it, its own included.
 * queries: [n, H, D], `stride` floats from one sequence to the next; cache: [pages, page_tokens, 2, K, D]; pages: [n, P];
 * out: [n, H, D]; D a multiple of 16. The softmax is kept up page by page (Milakov and Gimelshein 2018, arXiv 1805.02867). */
void attend_to_pages(const float *queries, const float *cache, const i64 *pages, const i64 *lengths, float *out, i64 n,
                     i64 stride, i64 P, i64 page_tokens, i64 H, i64 K, i64 D, double scaling) {
    const i64 page_size = page_tokens * 2 * K * D;
#pragma omp parallel for schedule(dynamic, 1)
    for (i64 s = 0; s < n; s++) {
        float most[H], total[H], score[H * page_tokens], *result = out + s * H * D;
        memset(result, 0, H * D * sizeof(float));
        for (i64 h = 0; h < H; h++) most[h] = -FLT_MAX, total[h] = 0;
        for (i64 start = 0; start < lengths[s]; start += page_tokens) {
            const i64 *page = pages + s * P + start / page_tokens;
            i64 count = lengths[s] - start < page_tokens ? lengths[s] - start : page_tokens;
            if (start + page_tokens < lengths[s])
                for (i64 i = 0; i < page_size; i += 16) __builtin_prefetch(cache + page[1] * page_size + i, 0, 2);
#define ATTEND(W) \
    attend_to_page(queries + s * stride, cache + page[0] * page_size, count, page_tokens, H, K, W, scaling, score, most, \
                   total, result)
            if (D == 64) ATTEND(4); /* a width known in advance stays in registers */
            else if (D == 128) ATTEND(8);
            else ATTEND(D / LANES);
        }
        for (i64 h = 0; h < H; h++)
            for (i64 i = 0; i < D; i++) result[h * D + i] /= total[h];
    }
}

/* Where B of one layer lies in its output's block. */
typedef struct {
    i64 output, row, num_rows, column, num_columns;
} Segment;

/* The factors that all slots of a slab have of one group of layers, float32 or, if `half`, bfloat16. a: [S, R, I];
 * bt[o]: [S, rows[o], columns[o]], zero outside the segments. Rows of all outputs together are the R rows of a, in order. */
typedef struct {
    i64 in_features, rank, num_outputs, num_segments, half;
    const void *a, *bt[2];
    i64 rows[2], columns[2];
    Segment segments[8];
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
INLINE void reduce(const void *a, i64 first, i64 I, const float *x, float *to, i64 R, int rows, int tokens, int half) {
    Vector sums[MOST_SUMS];
    for (int n = 0; n < rows * tokens; n++) sums[n] = (Vector){0};
    for (i64 i = 0; i + LANES <= I; i += LANES)
        for (int k = 0; k < rows; k++) {
            Vector some = factors_from(a, first + k * I + i, half);
            if (tokens < 4) __builtin_prefetch(place_of(a, first + (rows + k) * I + i, half));
            for (int t = 0; t < tokens; t++) sums[k * tokens + t] += some * *(const Vector *)(x + t * I + i);
        }
    for (int k = 0; k < rows; k++)
        for (int t = 0; t < tokens; t++) {
            float sum = sum_of(sums[k * tokens + t]);
            for (i64 i = I - I % LANES; i < I; i++) sum += factor(a, first + k * I + i, half) * x[t * I + i];
            to[t * R + k] = sum;
        }
}

/* to[t] += sum over `rank` rows of h[t, r] * bt[r], for W vectors of columns and `tokens` tokens. */
INLINE void expand(const void *bt, i64 first, i64 rank, i64 columns, const float *h, i64 R, float *to, const char *next,
                   int W, int tokens, int half) {
    Vector sums[MOST_SUMS];
    for (int t = 0; t < tokens; t++)
        for (int w = 0; w < W; w++) sums[t * W + w] = *(const Vector *)(to + t * columns + w * LANES);
    for (i64 r = 0; r < rank; r++)
        for (int w = 0; w < W; w++) {
            Vector some = factors_from(bt, first + r * columns + w * LANES, half);
            __builtin_prefetch(place_of(next, r * columns + w * LANES, half));
            for (int t = 0; t < tokens; t++) sums[t * W + w] += h[t * R + r] * some;
        }
    for (int t = 0; t < tokens; t++)
        for (int w = 0; w < W; w++) *(Vector *)(to + t * columns + w * LANES) = sums[t * W + w];
}

/* What one thread adds at a time: up to COLUMNS columns of one segment, to the tokens of stretch g. */
typedef struct {
    i64 g, o, rows, columns, first, from, width, row;
} Piece;

INLINE Piece piece(const Slots *slots, const Stretch *stretches, const i64 *chunk_of, i64 chunks, i64 item) {
    Piece p = {.g = item / chunks};
    i64 chunk = item % chunks, s = 0;
    while (chunk_of[s + 1] <= chunk) s++;
    const Segment *segment = &slots->segments[s];
    i64 within = (chunk - chunk_of[s]) * COLUMNS, rest = segment->num_columns - within;
    p.o = segment->output, p.rows = segment->num_rows, p.columns = slots->columns[p.o], p.row = segment->row;
    p.from = segment->column + within, p.width = rest < COLUMNS ? rest : COLUMNS;
    p.first = (stretches[p.g].slot * slots->rows[p.o] + segment->row) * p.columns + p.from;
    for (i64 before = 0; before < p.o; before++) p.row += slots->rows[before];
    return p;
}

INLINE void add_factors(const Slots *slots, const Stretch *stretches, i64 G, const float *x, float *const *y, i64 gated,
                        int half) {
    const i64 I = slots->in_features, R = slots->rank;
    i64 num_rows = 0, first_of[G], chunks = 0;
    for (i64 g = 0; g < G; g++) first_of[g] = num_rows, num_rows += stretches[g].count;
    i64 chunk_of[slots->num_segments + 1];
    for (i64 s = 0; s < slots->num_segments; s++)
        chunk_of[s] = chunks, chunks += (slots->segments[s].num_columns + COLUMNS - 1) / COLUMNS;
    chunk_of[slots->num_segments] = chunks;
    const i64 fours = (R + 3) / 4;
    float *reduced = malloc(num_rows * R * sizeof(float)); /* A x */
#pragma omp parallel
    {
        /* Where every thread has whole adapters, it has reduced itself all that it expands: nobody waits in between. */
        const i64 threads = omp_get_num_threads(), thread = omp_get_thread_num();
        for (i64 item = G * fours * thread / threads; item < G * fours * (thread + 1) / threads; item++) {
            i64 g = item / fours, r = item % fours * 4, count = stretches[g].count, t = 0;
            i64 first = (stretches[g].slot * R + r) * I;
#define REDUCE(ROW, ROWS, TOKENS) \
    reduce(slots->a, first + (ROW) * I, I, x + (stretches[g].start + t) * I, \
           reduced + (first_of[g] + t) * R + r + (ROW), R, ROWS, TOKENS, half)
            if (R - r >= 4) {
                for (; t + 4 <= count; t += 4) REDUCE(0, 4, 4); /* prompts: 16 sums stay in registers */
                for (; t + 2 <= count; t += 2) REDUCE(0, 4, 2);
                if (t < count) REDUCE(0, 4, 1);
            } else
                for (; t < count; t++)
                    for (i64 k = 0; k < R - r; k++) REDUCE(k, 1, 1);
        }
        if (G % threads) {
#pragma omp barrier
        }
        for (i64 item = G * chunks * thread / threads; item < G * chunks * (thread + 1) / threads; item++) {
            const Piece p = piece(slots, stretches, chunk_of, chunks, item);
            const Piece q = piece(slots, stretches, chunk_of, chunks, item + 1 < G * chunks ? item + 1 : item);
            const char *next = place_of(slots->bt[q.o], q.first, half);
            for (i64 t = 0, tokens; t < stretches[p.g].count; t += tokens) {
                tokens = stretches[p.g].count - t >= 2 ? 2 : 1;
                const float *h = reduced + (first_of[p.g] + t) * R + p.row;
                float *to = y[p.o] + (stretches[p.g].start + t) * p.columns + p.from;
                i64 i = 0;
#define EXPAND(W, TOKENS) \
    expand(slots->bt[p.o], p.first + i, p.rows, p.columns, h, R, to + i, place_of(next, i, half), W, TOKENS, half)
#define EXPAND_WHILE(W) \
    for (; i + (W) * LANES <= p.width; i += (W) * LANES) \
        if (tokens == 2) EXPAND(W, 2); else EXPAND(W, 1)
                EXPAND_WHILE(8);
                EXPAND_WHILE(4);
                EXPAND_WHILE(1);
                for (; i < p.width; i++)
                    for (i64 k = 0; k < tokens; k++)
                        for (i64 r = 0; r < p.rows; r++)
                            to[k * p.columns + i] +=
                                h[k * R + r] * factor(slots->bt[p.o], p.first + r * p.columns + i, half);
            }
        }
        if (gated) {
#pragma omp barrier
        }
#pragma omp for schedule(static)
        for (i64 t = 0; t < gated; t++)
            silu_times_row(y[0] + t * slots->columns[0], y[1] + t * slots->columns[0], slots->columns[0]);
    }
    free(reduced);
}

/* y[t] += B A x[t], with the factors of the slot whose stretch row t is in. x: [T, I]; y[o]: [T, columns[o]]. After it
 * y0 = silu(y0) * y1 in the first `gated` rows, also in those without an adapter. */
void add_adapters(const Slots *slots, const Stretch *stretches, i64 G, const float *x, float *y0, float *y1, i64 gated) {
    float *const y[2] = {y0, y1};
    if (slots->half) add_factors(slots, stretches, G, x, y, gated, 1);
    else add_factors(slots, stretches, G, x, y, gated, 0);
}
