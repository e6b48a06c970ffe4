// The native library of hpcloss: which pixels belong together, which of them are sampled, and losses of a few of them.
//
// A plain C interface: no torch, no Python. Every function checks its arguments and returns an error code; nothing
// throws across the boundary. What a function computes is defined in hpcloss/plan/sorting.py and
// hpcloss/plan/sampling.py; the results here are those, bit for bit. Functions of floats give what the PyTorch code in
// hpcloss/backends gives, but for rounding.
//
// Functions of integers exist twice: `hpcloss_X` for arrays in host memory, and `hpcloss_cuda_X` for arrays in memory of
// the current CUDA device, queued on `stream` without waiting for it. The CUDA half may be absent from a build.
// Functions of floats exist for host memory alone.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define HPCLOSS_API __declspec(dllexport)
#else
#define HPCLOSS_API __attribute__((visibility("default")))
#endif

#define HPCLOSS_ABI 1

#ifdef __cplusplus
extern "C" {
#endif

// Error codes. A message for each is in hpcloss/plan/native.py.
enum {
  HPCLOSS_OK = 0,
  HPCLOSS_ERROR_NULL = 1,       // a required pointer is null
  HPCLOSS_ERROR_SIZE = 2,       // a size or a count is out of its range
  HPCLOSS_ERROR_TYPE = 3,       // a type code that the argument cannot have
  HPCLOSS_ERROR_OFFSETS = 4,    // offsets descend or leave the rows (host memory only)
  HPCLOSS_ERROR_PIXEL = 5,      // a pixel index beyond the map (host memory only)
  HPCLOSS_ERROR_WORKSPACE = 6,  // the workspace is smaller than asked for
  HPCLOSS_ERROR_MEMORY = 7,     // out of host memory
  HPCLOSS_ERROR_CUDA = 8,       // a CUDA call failed; hpcloss_cuda_error() names it
};

// Element types.
enum { HPCLOSS_UINT8 = 0, HPCLOSS_INT32 = 1, HPCLOSS_INT64 = 2 };

// How a sample is drawn; what `values` of hpcloss_sample then are.
enum {
  HPCLOSS_UNIFORM = 0,    // null
  HPCLOSS_WEIGHTED = 1,   // float32 weight of each pixel
  HPCLOSS_HARDEST = 2,    // float32 score of each pixel, highest first
  HPCLOSS_HARD_EASY = 3,  // one byte a pixel, not 0 where the prediction is wrong
};

#define HPCLOSS_MAX_AXES 3
#define HPCLOSS_MAX_IGNORED 16

// The region of each pixel: given ids, or the cells of a grid over an image of 0 to 3 axes. Pixels are numbered in
// row-major order, image after image.
typedef struct {
  const void* ids;   // id of each pixel, or null: the grid. Ids outside [0, num_regions) remove the pixel
  int32_t ids_type;  // INT32 or INT64
  int32_t axes;
  int64_t extent[HPCLOSS_MAX_AXES];  // of the image, at least 1
  int64_t cell[HPCLOSS_MAX_AXES];    // of a cell, at least 1; cells at the far edges may be smaller
  int32_t per_image;  // 0: the same cell of every image is one region; 1: one region per image
} hpcloss_regions;

HPCLOSS_API int32_t hpcloss_abi(void);

// Stable counting sort of the pixels by segment, region * num_classes + rank; pixels that are ignored come last.
// The rank of a label is label - first_class, but that of `background`, where it is one of the classes, is 0 and the
// ranks below it are one higher.
//   labels [n] of label_type; ignore [num_ignore <= HPCLOSS_MAX_IGNORED]: labels that remove their pixel.
//   order [n] <- pixel of each row, of index_type (INT32 or INT64), as are the offsets
//   offsets [num_regions * num_classes + 1] <- first row of each segment, then the number of rows that are not ignored
//   outside [1] <- number of pixels whose label is no class and not in `ignore`; they count as ignored
HPCLOSS_API int32_t hpcloss_class_sort(const void* labels, int32_t label_type, int64_t n, const hpcloss_regions* regions,
                                       int64_t num_regions, int64_t first_class, int64_t num_classes,
                                       int64_t background, const int64_t* ignore, int64_t num_ignore, void* order,
                                       void* offsets, int32_t index_type, int64_t* outside, int32_t threads);

// The intervals of rows that such a sort left: for each of n rows the bounds of its segment (zero past the last one) and
// its own number; for each region the bounds of its rows and of its anchors, which are the rows behind the first class
// if that is the background, else all. offsets [num_regions * num_classes + 1]. Everything of index_type.
HPCLOSS_API int32_t hpcloss_class_intervals(const void* offsets, int64_t num_regions, int64_t num_classes,
                                            int32_t background_first, int64_t n, int32_t index_type, void* pos_start,
                                            void* pos_end, void* self_pos, void* anchor_start, void* anchor_end,
                                            void* key_start, void* key_end, int32_t threads);

// Stable sort of the pixels by (region, label) for any labels, with `background`, unless it is null, first in its region;
// pixels that are ignored come last, by number. And the intervals that the sort left, as of hpcloss_class_intervals.
// labels, regions, ignore and order as of hpcloss_class_sort; num_regions < 2^30. Everything else of index_type.
HPCLOSS_API int32_t hpcloss_label_sort(const void* labels, int32_t label_type, int64_t n, const hpcloss_regions* regions,
                                       int64_t num_regions, const int64_t* background, const int64_t* ignore,
                                       int64_t num_ignore, void* order, int32_t index_type, void* pos_start,
                                       void* pos_end, void* self_pos, void* anchor_start, void* anchor_end,
                                       void* key_start, void* key_end, int32_t threads);

// The number of positives and of negatives of each of n rows; zero for rows that are no anchors. The arguments are the
// fields of `Pairs` (hpcloss/plan/partition.py), anchor_end not descending. Everything of index_type.
HPCLOSS_API int32_t hpcloss_pair_counts(const void* pos_start, const void* pos_end, const void* self_pos,
                                        const void* anchor_start, const void* anchor_end, const void* key_start,
                                        const void* key_end, int64_t n, int64_t num_regions, int32_t index_type,
                                        void* positives, void* negatives, int32_t threads);

// counted [n] <- 1 for rows that have a positive and, if need_negatives, a negative, else 0. Arguments as above.
HPCLOSS_API int32_t hpcloss_pair_counted(const void* pos_start, const void* pos_end, const void* self_pos,
                                         const void* anchor_start, const void* anchor_end, const void* key_start,
                                         const void* key_end, int64_t n, int64_t num_regions, int32_t index_type,
                                         int32_t need_negatives, uint8_t* counted, int32_t threads);

// min(k, present) elements of each interval of rows, listed by ascending row without gaps (hpcloss/plan/sampling.py).
//   order [n], offsets [num_intervals + 1], both of index_type; n < 2^32; 1 <= k <= 2^31 - 1.
//   values [num_pixels]: see the kinds above. seed [1].
//   chosen [num_intervals * k] <- pixels, 0 in the unused tail; chosen_offsets [num_intervals + 1]; of index_type.
HPCLOSS_API int32_t hpcloss_sample(const void* order, const void* offsets, int32_t index_type, int64_t n,
                                   int64_t num_intervals, int64_t k, int32_t kind, const void* values,
                                   int64_t num_pixels, const int64_t* seed, void* chosen, void* chosen_offsets,
                                   int32_t threads);

// min(k, candidates) distinct rows of [pos_start[i], pos_end[i]) without self_pos[i] for each of n anchors, ascending,
// then -1 (hpcloss/plan/sampling.py). rows [n, k] and the bounds of index_type. seed [1].
HPCLOSS_API int32_t hpcloss_sample_positives(const void* pos_start, const void* pos_end, const void* self_pos,
                                             int32_t index_type, int64_t n, int64_t k, const int64_t* seed, void* rows,
                                             int32_t threads);

// A map of features. Pixel `p` of image `i` has number i * pixels + p; a batch of vectors has images of one pixel.
typedef struct {
  int64_t images, pixels, channels;
  int64_t image_stride, pixel_stride, channel_stride;  // in floats
} hpcloss_map;

// packed [rows, channels] <- the pixels of `order` [rows], of index_type, if asked divided by their length (a pixel
// shorter than 1e-12 becomes 0); inverse_norm [rows] <- by what each was multiplied. Rows from `live` on are 0.
HPCLOSS_API int32_t hpcloss_pack(const float* features, const hpcloss_map* map, const void* order, int32_t index_type,
                                 int64_t rows, int64_t live, int32_t normalize, float* packed, float* inverse_norm,
                                 int32_t threads);

// d_features <- the gradient of the map's pixels from grad [rows, channels], that of the packed rows; the order names
// each pixel once.
HPCLOSS_API int32_t hpcloss_unpack(const float* grad, const float* packed, const float* inverse_norm,
                                   const hpcloss_map* map, const void* order, int32_t index_type, int64_t rows,
                                   int32_t normalize, float* d_features, int32_t threads);

// Rows of logits [rows, keys] (similarity * scale / ln 2) of regions one behind the other, each with `rows_of_region`
// anchors and `keys` keys; key 0 of the first has number first_key. pos_start, pos_end, self_pos [rows] of index_type:
// key numbers as in `Pairs`.
typedef struct {
  int64_t rows, rows_of_region, keys, first_key;
  const void *pos_start, *pos_end, *self_pos;
  int32_t index_type;
} hpcloss_rows;

// Which keys count (hpcloss/primitives/pair_lse.py).
enum { HPCLOSS_POSITIVE_KEYS = 0, HPCLOSS_NEGATIVE_KEYS = 1, HPCLOSS_OTHERS = 2, HPCLOSS_EVERY = 3 };

// lse [rows, count] <- log2 of the sum of 2^(factor_k logit) over the keys of the rule; -inf for none.
HPCLOSS_API int32_t hpcloss_lse(const float* logits, const hpcloss_rows* rows, int32_t rule, const float* factors,
                                int32_t count, float* lse, int32_t threads);
// logits <- the sum over k of grad [rows, count] * factor_k * 2^(factor_k logit - lse_k), 0 for other keys. These powers
// are divided by their sum, which is 1 but for the rounding of the lse; also below.
HPCLOSS_API int32_t hpcloss_lse_slopes(float* logits, const hpcloss_rows* rows, int32_t rule, const float* factors,
                                       int32_t count, const float* lse, const float* grad, int32_t threads);
// lse [regions * keys] <- log2 of the sum of 2^logit over the rows that count the key; -inf for none.
HPCLOSS_API int32_t hpcloss_lse_columns(const float* logits, const hpcloss_rows* rows, int32_t rule, float* lse);
// logits <- row_grad * 2^(logit - row_lse) + column_grad * 2^(logit - column_lse), 0 for other keys. column_lse is
// finite, also of a key that no row counts.
HPCLOSS_API int32_t hpcloss_lse_both_slopes(float* logits, const hpcloss_rows* rows, int32_t rule, const float* row_lse,
                                            const float* row_grad, const float* column_lse, const float* column_grad,
                                            int32_t threads);

// How a loss of hpcloss_contrast is formed (hpcloss/primitives/contrast.py).
enum { HPCLOSS_OWN = 0, HPCLOSS_NEGATIVES = 1, HPCLOSS_ALL = 2, HPCLOSS_PAIR = 3 };

typedef struct {
  int32_t form;
  int32_t differentiated;   // whether slopes flow through the weights of the positives
  float of_weights;         // a weight's exponent over the positive's logit, -hardness / scale; 0: all weigh alike
  float damped;             // discount / scale
  float log2_multiplicity;  // how often each key stands in the denominators
} hpcloss_contrast_options;

// The contrast of anchors with the keys of their region, of regions one behind the other that have `rows_of_region`
// anchors and `keys` keys each; key 0 of the first has number first_key.
//   logits [rows, keys]: similarity * scale / ln 2; overwritten, if needs_slopes with d loss / d similarity / scale.
//   pos_start, pos_end, self_pos [rows] of index_type: key numbers as in `Pairs`.
//   loss [rows], counted [rows] <- as `contrast` returns them. by_scale [rows], or null <- scale * d loss / d scale.
HPCLOSS_API int32_t hpcloss_contrast(float* logits, int64_t rows, int64_t rows_of_region, int64_t keys,
                                     int64_t first_key, const void* pos_start, const void* pos_end,
                                     const void* self_pos, int32_t index_type, const hpcloss_contrast_options* options,
                                     int32_t needs_slopes, float* loss, uint8_t* counted, float* by_scale,
                                     int32_t threads);

// both [n, n] <- slopes [i, j] * factor [i] + slopes [j, i] * factor [j].
HPCLOSS_API int32_t hpcloss_add_transpose(const float* slopes, int64_t n, const float* factor, float* both,
                                          int32_t threads);

// ---- CUDA ----
// Workspaces are arrays of `bytes` bytes in device memory, aligned to 16; their sizes come from hpcloss_cuda_X_bytes.
// `regions`, its `ids` excepted, and `ignore` are read from host memory.

// The driver's and the linked runtime's version, 1000 * major + 10 * minor; 0 for no driver.
HPCLOSS_API int32_t hpcloss_cuda_versions(int32_t* driver, int32_t* runtime);
// Whether the current device can run this library's kernels; loads them, which a graph capture may not.
HPCLOSS_API int32_t hpcloss_cuda_probe(void);
// The text of the last error of the calling thread.
HPCLOSS_API const char* hpcloss_cuda_error(void);

// n >= 1.
HPCLOSS_API int64_t hpcloss_cuda_class_sort_bytes(int64_t n, int64_t num_segments, int32_t index_type);
HPCLOSS_API int32_t hpcloss_cuda_class_sort(const void* labels, int32_t label_type, int64_t n,
                                            const hpcloss_regions* regions, int64_t num_regions, int64_t first_class,
                                            int64_t num_classes, int64_t background, const int64_t* ignore,
                                            int64_t num_ignore, void* order, void* offsets, int32_t index_type,
                                            int64_t* outside, void* workspace, int64_t bytes, void* stream);

HPCLOSS_API int32_t hpcloss_cuda_class_intervals(const void* offsets, int64_t num_regions, int64_t num_classes,
                                                 int32_t background_first, int64_t n, int32_t index_type,
                                                 void* pos_start, void* pos_end, void* self_pos, void* anchor_start,
                                                 void* anchor_end, void* key_start, void* key_end, void* stream);

// n >= 1. `background` is read from host memory.
HPCLOSS_API int64_t hpcloss_cuda_label_sort_bytes(int64_t n, int32_t index_type);
HPCLOSS_API int32_t hpcloss_cuda_label_sort(const void* labels, int32_t label_type, int64_t n,
                                            const hpcloss_regions* regions, int64_t num_regions,
                                            const int64_t* background, const int64_t* ignore, int64_t num_ignore,
                                            void* order, int32_t index_type, void* pos_start, void* pos_end,
                                            void* self_pos, void* anchor_start, void* anchor_end, void* key_start,
                                            void* key_end, void* workspace, int64_t bytes, void* stream);

HPCLOSS_API int32_t hpcloss_cuda_pair_counts(const void* pos_start, const void* pos_end, const void* self_pos,
                                             const void* anchor_start, const void* anchor_end, const void* key_start,
                                             const void* key_end, int64_t n, int64_t num_regions, int32_t index_type,
                                             void* positives, void* negatives, void* stream);

HPCLOSS_API int32_t hpcloss_cuda_pair_counted(const void* pos_start, const void* pos_end, const void* self_pos,
                                              const void* anchor_start, const void* anchor_end, const void* key_start,
                                              const void* key_end, int64_t n, int64_t num_regions, int32_t index_type,
                                              int32_t need_negatives, uint8_t* counted, void* stream);

// k <= 4096. A pixel beyond the map is not chosen.
HPCLOSS_API int64_t hpcloss_cuda_sample_bytes(int64_t n, int64_t num_intervals, int64_t k, int32_t kind,
                                              int32_t index_type);
HPCLOSS_API int32_t hpcloss_cuda_sample(const void* order, const void* offsets, int32_t index_type, int64_t n,
                                        int64_t num_intervals, int64_t k, int32_t kind, const void* values,
                                        int64_t num_pixels, const int64_t* seed, void* chosen, void* chosen_offsets,
                                        void* workspace, int64_t bytes, void* stream);

HPCLOSS_API int32_t hpcloss_cuda_sample_positives(const void* pos_start, const void* pos_end, const void* self_pos,
                                                  int32_t index_type, int64_t n, int64_t k, const int64_t* seed,
                                                  void* rows, void* stream);

#ifdef __cplusplus
}
#endif
